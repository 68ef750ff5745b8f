"""How a generated token came to be picked, as `replay_sample` tells it. Plain frozen values, with no gRPC in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

COLUMNS = ("rank", "token", "text", "logit", "biased", "penalised", "scaled", "probability", "final", "")


@dataclass(frozen=True, slots=True)
class SampleFilter:
    """What a filter left: so many tokens, with this share of all tokens' probability after temperature."""

    name: str
    value: float
    kept: int
    mass: float


@dataclass(frozen=True, slots=True)
class SampleCandidate:
    """A token on its way: its logit as the model gave it, with biases, with penalties; then after temperature.

    `scaled` is how far it is below the likeliest in units of the temperature, `probability` that after temperature,
    `final` that after the filters. `removed_by` is the filter that took it out, "ban", or empty.
    """

    token: int
    text: str
    rank: int
    logit: float
    biased: float
    penalised: float
    scaled: float
    probability: float
    final: float
    removed_by: str


@dataclass(frozen=True, slots=True, repr=False)
class Replay:
    """One way from the logits to a token; printed as a table.

    `uniform` is the number drawn, None where the likeliest token is taken. It runs over the tokens left in order of
    their ids, or from the likeliest down; numbers in [lower, upper) pick this token.
    """

    sampling: dict[str, object]
    token: int
    text: str
    rank: int
    uniform: float | None
    likeliest_first: bool
    lower: float | None
    upper: float | None
    filters: tuple[SampleFilter, ...]
    candidates: tuple[SampleCandidate, ...]
    banned: int

    def candidate(self, token: int) -> SampleCandidate:
        """What became of a token.

        Raises:
            KeyError: it was not told; name it in `tokens=`.
        """
        for candidate in self.candidates:
            if candidate.token == token:
                return candidate
        raise KeyError(token)

    def __repr__(self) -> str:
        rows = [COLUMNS, *map(_cells, self.candidates)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        marks = ["  ", *("> " if candidate.token == self.token else "  " for candidate in self.candidates)]
        lines = [mark + "  ".join(map(str.rjust, row, widths)).rstrip() for mark, row in zip(marks, rows, strict=True)]
        return "\n".join([*self._facts(), *lines])

    def _repr_html_(self) -> str:
        """The table, for a notebook."""
        head = "".join(f"<th>{name}</th>" for name in COLUMNS)
        rows = []
        for candidate in self.candidates:
            style = " style='font-weight:bold'" if candidate.token == self.token else ""
            rows.append(f"<tr{style}>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(candidate))}</tr>")
        facts = "<br>".join(map(escape, self._facts()))
        return f"<div>{facts}</div><table><tr>{head}</tr>{''.join(rows)}</table>"

    def _facts(self) -> Iterator[str]:
        if self.uniform is None:
            yield f"picked {self.token} {self.text!r}: the likeliest"
        else:
            order = "from the likeliest down" if self.likeliest_first else "in order of ids"
            inside = "" if self.lower is None else f" in [{self.lower:.6f}, {self.upper:.6f})"
            yield f"picked {self.token} {self.text!r}: rank {self.rank}, number {self.uniform:.6f}{inside}, {order}"
        if self.banned:
            yield f"banned: {self.banned} tokens"
        for each in self.filters:
            yield f"{each.name} {each.value:g}: left {each.kept} tokens, mass {each.mass:.4g}"


@dataclass(frozen=True, slots=True, repr=False)
class SampleReplay:
    """How the token at a position was picked; printed as tables.

    `replay` is its sampling done again as the request asked, from logits that were computed again: `agrees` says that
    it picks the same token. `changed` is that with other parameters and the same number, if any were given.
    """

    position: int
    prompt_tokens: int
    token: int
    text: str
    agrees: bool
    overridden: bool
    running: bool
    replay: Replay
    changed: Replay | None
    cached_positions: int
    recomputed_positions: int
    model_hash: str
    kernels: str
    dtype: str
    quantization: str
    kv_dtype: str

    def __repr__(self) -> str:
        parts = [self._heading(), repr(self.replay)]
        if self.changed is not None:
            parts += ["with the parameters given:", repr(self.changed)]
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        """The tables, for a notebook."""
        parts = [f"<div>{escape(self._heading())}</div>", self.replay._repr_html_()]
        if self.changed is not None:
            parts += ["<div>with the parameters given:</div>", self.changed._repr_html_()]
        return "".join(parts)

    def _heading(self) -> str:
        doubt = "" if self.agrees else ", WHICH THIS REPLAY DOES NOT PICK"
        override = ", overridden by the request" if self.overridden else ""
        return f"token {self.token} {self.text!r} at position {self.position}{override}{doubt}"


def _cells(candidate: SampleCandidate) -> tuple[str, ...]:
    return (
        str(candidate.rank),
        str(candidate.token),
        repr(candidate.text),
        *(f"{value:.3f}" for value in (candidate.logit, candidate.biased, candidate.penalised, candidate.scaled)),
        f"{candidate.probability:.4g}",
        f"{candidate.final:.4g}",
        candidate.removed_by,
    )
