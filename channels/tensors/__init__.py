"""Large tensors between processes: memory that both ends reach, in place of bytes through a socket."""
