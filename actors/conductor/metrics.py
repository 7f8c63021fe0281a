"""Where numbers go: metrics.jsonl (a line per step and per evaluation) and TensorBoard. Blocking; run off the loop."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors.json_lines import line_of


class MetricsWriter:
    """Appends lines; a line is written whole, in one write, so that readers never see half of one."""

    def __init__(self, run_dir: Path, *, tensorboard: bool) -> None:
        self._file = (run_dir / "metrics.jsonl").open("ab", buffering=0)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def write(self, line: Mapping[str, Any], *, only: str = "") -> None:
        """line: must have "step"; numbers whose key begins with `only` also go to TensorBoard under it."""
        self._file.write(line_of(line))
        if self._board is not None:
            for key, value in line.items():
                if key != "step" and key.startswith(only) and isinstance(value, int | float):
                    self._board.add_scalar(key, value, line["step"])

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        if self._board is not None:
            self._board.close()
