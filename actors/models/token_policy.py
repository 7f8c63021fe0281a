"""A small transformer that reads image patches, proprioception and an instruction, and emits action tokens.

OpenVLA's shape (arXiv:2406.09246, section 3.1) in miniature: a decoder of the Llama kind over
`start | patches | proprioception | instruction | action tokens`; the proprioception is one token (OpenVLA-OFT,
arXiv:2502.19645, section 3). An action's numbers are tokens one by one, the chunk's steps one after the other. The
critic reads the state that the first action token is drawn from.

B batch, P tokens of the prefix, U action tokens (units), D width.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel

from actors.models.action_policy import Acted, ActionPolicy, Observations, Read
from actors.models.config import PolicyConfig
from actors.models.distributions import Bounds, Categorical
from actors.models.encoders import StateNormalizer, is_image
from actors.models.running_moments import RunningMoments

BYTES = 256


class TokenPolicy(ActionPolicy):
    """A unit is an action token."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.chunk, self.units_per_step = config.chunk, config.action
        self.draws = config.chunk * config.action
        self._action, self._bins = config.action, config.bins
        self._instruction = config.instruction
        shapes = {k: v for k, v in config.observation.items() if k != config.instruction}
        self._cameras = [name for name, shape in shapes.items() if is_image(shape)]
        width = config.width
        self.patches = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Conv2d(3, width, config.patch, config.patch),
                    nn.GELU(),
                    nn.Conv2d(width, width, 1),
                )
                for name in self._cameras
            }
        )
        self.places = nn.ParameterDict(
            {
                name: nn.Parameter(
                    0.02 * torch.randn(shape[0] * shape[1] // config.patch**2, width)
                )
                for name, shape in shapes.items()
                if is_image(shape)
            }
        )
        self.state = StateNormalizer(shapes, normalize=config.normalize_observations)
        self.proprioception = nn.Linear(self.state.size, width) if self.state.size else None
        self.letters = nn.Embedding(BYTES, width)
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.action_tokens = nn.Embedding(config.bins, width)
        for table in (self.letters, self.action_tokens):
            nn.init.normal_(table.weight, std=0.02)
        self.decoder = LlamaModel(
            LlamaConfig(
                vocab_size=1,  # its own embedding is not used
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                max_position_embeddings=4096,
                attn_implementation="sdpa",
            )
        )
        del self.decoder.embed_tokens
        self.head = nn.Linear(width, config.bins, bias=False)
        nn.init.normal_(self.head.weight, std=0.02 / width**0.5)
        self.values = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.returns = RunningMoments(1) if config.normalize_returns else None
        self.bounds = Bounds(config)

    @torch.no_grad()
    def act(self, observations: Observations, uniforms: Tensor, *, greedy: bool) -> Acted:
        embedded, mask = self._prefix(observations)
        cache = DynamicCache(config=self.decoder.config)
        hidden = self._decode(embedded, mask, cache)[:, -1]
        values = self.values(hidden)[:, 0]
        tokens, logprobs = [], []
        for unit in range(self.draws):
            distribution = Categorical(self.head(hidden))
            token = distribution.mode() if greedy else distribution.sample(uniforms[:, unit])
            tokens.append(token)
            logprobs.append(distribution.log_prob(token))
            if unit + 1 < self.draws:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                hidden = self._decode(self.action_tokens(token).unsqueeze(1), mask, cache)[:, 0]
        chosen = torch.stack(tokens, dim=1)
        return Acted(
            actions=self._actions(chosen),
            tokens=chosen,
            logprobs=torch.stack(logprobs, dim=1).float(),
            values=values.float(),
        )

    def evaluate(self, observations: Observations, recompute: Mapping[str, Tensor]) -> Read:
        tokens = recompute["tokens"].long()  # [B, U]
        prefix, mask = self._prefix(observations)
        embedded = torch.cat([prefix, self.action_tokens(tokens[:, :-1])], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), self.draws - 1)], dim=1)
        hidden = self._decode(embedded, mask)[:, prefix.shape[1] - 1 :]  # [B, U, D]
        distribution = Categorical(self.head(hidden))
        return Read(
            logprobs=distribution.log_prob(tokens),
            entropy=distribution.entropy(),
            values=self.values(hidden[:, 0])[:, 0],
        )

    def value(self, observations: Observations) -> Tensor:
        embedded, mask = self._prefix(observations)
        values: Tensor = self.values(self._decode(embedded, mask)[:, -1])[:, 0]
        return values

    def observed(self) -> dict[str, RunningMoments]:
        return {} if self.state.moments is None else {"state": self.state.moments}

    def rows(self, observations: Observations) -> dict[str, Tensor]:
        return {} if self.state.moments is None else {"state": self.state.rows(observations)}

    def _prefix(self, observations: Observations) -> tuple[Tensor, Tensor]:
        """Embeddings [B, P, D], and int64 [B, P], which is 0 where the instruction is shorter than its array."""
        batch = len(next(iter(observations.values())))
        dtype = self.start.dtype
        parts = [self.start.expand(batch, 1, -1)]
        for name in self._cameras:
            pixels = observations[name].permute(0, 3, 1, 2).to(dtype) / 127.5 - 1.0
            parts.append(self.patches[name](pixels).flatten(2).transpose(1, 2) + self.places[name])
        if self.proprioception is not None:
            parts.append(self.proprioception(self.state(observations).to(dtype)).unsqueeze(1))
        embedded = torch.cat(parts, dim=1)
        mask = torch.ones(embedded.shape[:2], dtype=torch.int64, device=embedded.device)
        if self._instruction is None:
            return embedded, mask
        letters = observations[self._instruction].long()
        there = (letters > 0).long()
        # Padding goes to the left of the text, so that the action follows the text's last letter.
        order = there.argsort(dim=1, stable=True)
        letters, there = letters.gather(1, order), there.gather(1, order)
        # An action token still has something to follow where there is no text: what is before the padding.
        return torch.cat([embedded, self.letters(letters)], dim=1), torch.cat([mask, there], dim=1)

    def _decode(self, embedded: Tensor, mask: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """[B, new, D]. mask: [B, all so far]"""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -embedded.shape[1] :]
        hidden: Tensor = self.decoder(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden

    def _actions(self, tokens: Tensor) -> Tensor:
        """float32 [B, chunk, action] of tokens [B, U]."""
        inner = (tokens.double() + 0.5) / self._bins * 2.0 - 1.0
        inner = inner.view(len(tokens), self.chunk, self._action)
        actions: Tensor = self.bounds(inner).float()
        return actions
