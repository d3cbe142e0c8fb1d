"""scores.png and latency.png."""

from __future__ import annotations

from pathlib import Path

from web4lora_deployer.report.facts import ReportFacts, VerifySummary

_COLORS = {"base": "#cbd5e1", "reference": "#64748b", "deployed": "#0f766e"}


def plot_scores(path: Path, facts: ReportFacts, summary: VerifySummary) -> None:
    """Plot each score of each model as a bar, with the deployed model's 95 % interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    roles = list(facts.models)
    figure = Figure(figsize=(9.0, 0.9 + 0.75 * len(summary.scores)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    thickness = 0.8 / len(roles)
    for index, role in enumerate(roles):
        offset = (index - (len(roles) - 1) / 2) * thickness
        for row, score in enumerate(summary.scores):
            value = {
                "base": score.base_percent,
                "reference": score.reference_percent,
                "deployed": score.deployed_percent,
            }[role]
            if value is None:
                continue
            label = facts.models[role].model.label if row == 0 else None
            axes.barh(row + offset, value, thickness * 0.92, color=_COLORS[role], label=label)
            edge = value
            if role == "deployed":
                low, high = score.deployed_low_percent, score.deployed_high_percent
                axes.plot([low, high], [row + offset] * 2, color="#0f172a", linewidth=1.2)
                edge = max(high, value)
            axes.text(
                edge + 1.2, row + offset, f"{round(value, 1):g}", va="center", fontsize=8, color="#334155"
            )
    axes.set_yticks(range(len(summary.scores)), [f"{s.title}  (n={s.prompts})" for s in summary.scores])
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("per cent passed; line: 95 % interval of the deployed model")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=len(roles), frameon=False)
    figure.savefig(path)


def plot_latency(path: Path, facts: ReportFacts) -> None:
    """Plot time to the first token and speed by requests at once."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = facts.deployed.result.latency
    figure = Figure(figsize=(9.0, 2.9), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    first, speed = figure.subplots(1, 2)
    names = [f"{row.requests_at_once} at once" for row in rows]
    places = range(len(rows))
    milliseconds = [1000 * row.first_token_seconds for row in rows]
    bars = first.bar(places, milliseconds, 0.5, color="#c2410c")
    first.bar_label(bars, fmt="%.0f", fontsize=8)
    first.set_title("time to the first token, ms (median)", fontsize=10)
    one = speed.bar(
        [p - 0.2 for p in places],
        [r.tokens_per_second for r in rows],
        0.38,
        color="#0f766e",
        label="one request",
    )
    every = speed.bar(
        [p + 0.2 for p in places],
        [r.total_tokens_per_second for r in rows],
        0.38,
        color="#94a3b8",
        label="all, prompts included",
    )
    for group in (one, every):
        speed.bar_label(group, fmt="%.0f", fontsize=8)
    speed.set_title("tokens/s", fontsize=10)
    speed.legend(loc="upper center", ncols=2, frameon=False, fontsize=8)
    for axes in (first, speed):
        axes.set_xticks(places, names)
        axes.margins(y=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
