"""What to do about limits that were missed or are undecided, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from web4lora_deployer.suite import Budgets, Gate, Score, State
from web4lora_deployer.suite.budgets import NOT_MEASURED

_DROP, _SCORE = "score drop: ", "score: "
_LOW_PERCENT = 50.0
_OTHER = {
    "size reduction": "For a smaller file name a smaller type first in `package.quantizations`.",
    "generation speed": "For more tokens/s take a smaller type, a smaller base, or fewer requests at once.",
    "memory": "For less memory lower `deploy.context_tokens` or `deploy.parallel`, or take a smaller type.",
}


def advice(
    scores: Sequence[Score], gates: Sequence[Gate], budgets: Budgets, better: str = ""
) -> tuple[str, ...]:
    """Say what to do, the most pressing first.

    Args:
        scores: The scores.
        gates: How the limits came out.
        budgets: The limits.
        better: The other model that drops are measured from; empty: the same model before quantization.
    """
    by_name = {score.name: score for score in scores}
    missed = [gate for gate in gates if gate.state is State.FAILED]
    undecided = [gate for gate in gates if gate.state is State.UNDECIDED]
    return tuple(
        [*_missed(by_name, missed, budgets, better), *_low(scores, budgets), *_undecided(by_name, undecided)]
    )


def subject(gate: Gate, scores: Mapping[str, Score]) -> str:
    """Return what a limit is about, for people: "tool call, valid (drop)"."""
    name = gate.name.removeprefix(_DROP).removeprefix(_SCORE)
    title = scores[name].title if name in scores else name
    return f"{title} (drop)" if gate.name.startswith(_DROP) else title


def _missed(
    scores: Mapping[str, Score], gates: Sequence[Gate], budgets: Budgets, better: str
) -> Iterator[str]:
    lost: list[str] = []
    unlearnt: list[str] = []
    for gate in gates:
        name = gate.name.removeprefix(_DROP).removeprefix(_SCORE)
        if gate.name.startswith(_DROP):
            lost.append(scores[name].title)
        elif gate.name.startswith(_SCORE):
            before = scores[name].reference_percent
            floor = budgets.min_score_percent.get(name, 0.0)
            (lost if before is not None and before >= floor else unlearnt).append(scores[name].title)
    if lost and not better:
        yield (
            f"Quantizing costs too much here ({_listed(lost)}): name a larger type first in "
            "`package.quantizations` (Q5_K_M, Q6_K, Q8_0), or set `package.importance_matrix: true`."
        )
    elif lost:
        yield f"{better} is better at this ({_listed(lost)}): keep that one."
    if unlearnt:
        yield (
            f"Training has not brought it there ({_listed(unlearnt)}): give it more or cleaner rows of that "
            "kind, more `train.epochs`, or a larger base. The report's failing examples show what is wrong."
        )
    for gate in gates:
        if gate.name in _OTHER:
            yield _OTHER[gate.name]


def _low(scores: Sequence[Score], budgets: Budgets) -> Iterator[str]:
    """Name what surely fails more often than not, where no floor says so."""
    low = [
        f"{score.title} {score.deployed_percent:.0f} %"
        for score in scores
        if score.deployed_high_percent < _LOW_PERCENT and score.name not in budgets.min_score_percent
    ]
    if low:
        yield f"Low, though no limit is set for it: {_listed(low)}. Don't rely on the model for that."


def _undecided(scores: Mapping[str, Score], gates: Sequence[Gate]) -> Iterator[str]:
    unmeasured = [gate.name for gate in gates if gate.measured == NOT_MEASURED]
    if unmeasured:
        yield f"Not measured: {_listed(unmeasured)}. Drop the limit, or test where it can be measured."
    open_ = sorted((gate for gate in gates if gate.prompts_needed), key=lambda gate: gate.prompts_needed)
    if open_:
        first, last = open_[0], open_[-1]
        many = f"about {first.prompts_needed:,} prompts of its kind for {subject(first, scores)}"
        if last is not first:
            many += f", up to about {last.prompts_needed:,} for {subject(last, scores)}"
        yield (
            f"To decide what is undecided, add held-out prompts to the suite ({many}), or allow more. "
            "`deploy.promote: passed` takes an undecided model, `proven` does not."
        )
    close = [
        subject(gate, scores) for gate in gates if gate.measured != NOT_MEASURED and not gate.prompts_needed
    ]
    if close:
        yield f"Right at the limit, where no number of prompts decides: {_listed(close)}. Move the limit."


def _listed(names: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(names))
