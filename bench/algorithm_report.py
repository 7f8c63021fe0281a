"""A picture and two tables of finished runs of algorithms, put into docs/algorithms.md."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.algorithm_contrasts import CONTRASTS
from bench.algorithm_figures import GOAL, Curve, Found, curve, mean_curve, summary

BEGIN, END = "<!-- measured by `make algorithms` -->", "<!-- end of what was measured -->"
MISSING = "not measured yet"
PICTURE, PAGE = "algorithms.png", "algorithms.md"
PANELS = {  # GRPO stands in grey in every one
    "baselines of the group": ("grpo", "dr_grpo", "rloo"),
    "other clipping": ("dapo", "gspo", "cispo"),
    "batch-normalised, no critic": ("reinforce_pp", "reinforce_pp_baseline"),
    "critic, staleness": ("ppo", "decoupled_ppo", "grpo_async"),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73")  # told apart by colour-blind readers too


def write(folder: Path, names: Sequence[str], found: Found) -> None:
    """Draw the picture (where there is anything to draw) and rewrite the marked section of the page.

    Raises ValueError when the page has no such section.
    """
    page = folder / PAGE
    text = with_section(page.read_text(), section(names, found))
    if any(label in found for label in names):
        draw(folder / PICTURE, found)
    page.write_text(text)


def with_section(page: str, content: str) -> str:
    """The page with something else between the two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(
            f"the page lacks the lines {BEGIN} and {END}, between which figures are written"
        )
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def section(names: Sequence[str], found: Found) -> str:
    """What stands between the marks."""
    measured = any(label in found for label in names)
    picture = f"![Reward of every algorithm]({PICTURE})\n\n" if measured else ""
    return picture + "\n".join([*_setting(found), *_results(names, found), "", *_contrasts(found)])


def figures(names: Sequence[str], found: Found) -> dict[str, Any]:
    """The tables for programs: each run, and each contrast."""
    return {
        "goal": GOAL,
        "runs": {
            name: [{"seed": record.seed, **summary(record)} for record in found.get(name, ())]
            for name in names
        },
        "contrasts": [
            {
                "algorithm": each.algorithm,
                "claim": each.claim,
                "number": each.number,
                "value": values[0],
                "against": each.against,
                "against_value": values[1],
            }
            for each in CONTRASTS
            if each.algorithm in names
            for values in [each.values(found)]
        ],
        "load": {
            f"{record.label} seed {record.seed}": record.load
            for records in found.values()
            for record in records
        },
        "surroundings": [
            dict(each)
            for each in {
                str(record.surroundings): record.surroundings
                for records in found.values()
                for record in records
            }.values()
        ],
    }


def _setting(found: Found) -> Iterator[str]:
    machines = sorted(
        {
            f"{record.surroundings['hardware']['cpu']}, {record.surroundings['hardware']['cores']} cores, "
            f"torch {record.surroundings['versions']['torch']}"
            for records in found.values()
            for record in records
        }
    )
    if machines:
        yield f"On {'; '.join(machines)}. Several seeds: mean (lowest to highest).\n"


def _results(names: Sequence[str], found: Found) -> Iterator[str]:
    yield f"| algorithm | seeds | reward reached | groups to {GOAL} | seconds to {GOAL} | trained tokens/s |"
    yield "|---|---|---|---|---|---|"
    for name in names:
        rows = [summary(record) for record in found.get(name, ())]
        if not rows:
            yield f"| {name} | 0 | " + " | ".join([MISSING] * 4) + " |"
            continue
        cells = [
            _cell([row["reward"] for row in rows], 2),
            _cell([row["groups_to_goal"] for row in rows], 0),
            _cell([row["seconds_to_goal"] for row in rows], 0),
            _cell([row["tokens_per_s"] for row in rows], 0),
        ]
        yield f"| {name} | {len(rows)} | {' | '.join(cells)} |"


def _contrasts(found: Found) -> Iterator[str]:
    yield "| algorithm | what sets it apart | number | it has | compared with | which has |"
    yield "|---|---|---|---|---|---|"
    for each in CONTRASTS:
        ours, other = (MISSING if value is None else f"{value:.3g}" for value in each.values(found))
        yield (
            f"| {each.algorithm} | {each.claim} | {each.number} | {ours} | {each.against} | {other} |"
        )


def _cell(values: Sequence[float | None], digits: int) -> str:
    """Mean and range; a seed that did not get there is said, not left out silently."""
    there = [value for value in values if value is not None]
    if not there:
        return "not reached"
    text = f"{sum(there) / len(there):,.{digits}f}"
    if len(there) > 1:
        text += f" ({min(there):,.{digits}f} to {max(there):,.{digits}f})"
    missed = len(values) - len(there)
    return f"{text}; {missed} of {len(values)} not" if missed else text


def draw(path: Path, found: Found) -> None:
    """Small multiples: reward over groups above, over seconds below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, rows = plt.subplots(
        2, len(PANELS), figsize=(13, 6.2), dpi=110, sharey=True, sharex="row", squeeze=False
    )
    for column, (title, names) in enumerate(PANELS.items()):
        shown = [(name, COLOURS[place]) for place, name in enumerate(names)]
        if "grpo" not in names:
            shown.insert(0, ("grpo", "#999999"))
        for axes, axis in zip(rows[:, column], ("groups", "seconds"), strict=True):
            for name, colour in shown:
                if records := found.get(name):
                    _line(axes, [curve(record) for record in records], axis, name, colour)
            axes.axhline(GOAL, color="black", linewidth=0.7, linestyle=":")
            axes.set_xlabel("groups sampled (8 answers each)" if axis == "groups" else "seconds")
            axes.set_ylim(0.3, 1.0)
            axes.grid(alpha=0.25)
        rows[0, column].set_title(title)
        if rows[0, column].get_legend_handles_labels()[0]:
            rows[0, column].legend(loc="lower right", fontsize=8)
    for axes in rows[:, 0]:
        axes.set_ylabel("reward: share of exact answers")
        axes.set_xlim(left=0)  # the row shares its axis: now that all of its curves are there
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _line(axes: Any, curves: Sequence[Curve], axis: str, name: str, colour: str) -> None:
    grid, mean, low, high = mean_curve(
        [getattr(each, axis) for each in curves], [each.rewards for each in curves]
    )
    seeds = f" ({len(curves)} seeds)" if len(curves) > 1 else ""
    axes.plot(grid, mean, color=colour, linewidth=1.5, label=f"{name}{seeds}")
    if len(curves) > 1:
        axes.fill_between(grid, low, high, color=colour, alpha=0.18, linewidth=0)
