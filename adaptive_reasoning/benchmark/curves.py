"""Accuracy-token curves of one model: over budgets of its thinking, and over a bias on the token that says its mode.

    budget N    a thinking that is not closed after N tokens is closed there; the answer goes on behind the closing
    bias b      b is added to the logit of the mode's token, where the openings of the modes part

Both are settings of an evaluation in which the model chooses freely, with the random numbers of the free setting: up to
where a budget or a bias changes a token, a response is the free one, token for token. A bias of 0, and a budget beyond
the longest thinking, are the free setting. More of a bias never takes a choice for the mode back (with --eval_top_p 1).
"""

import dataclasses
import io
import math
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

import torch
from jsonargparse.typing import PositiveInt

from adaptive_reasoning.core.files import write_bytes_atomic
from adaptive_reasoning.errors import UserError, say
from adaptive_reasoning.formats import ResponseFormat
from adaptive_reasoning.formats.dialogue import DialogueFormat
from adaptive_reasoning.report.console import aligned, number
from adaptive_reasoning.report.curves import STYLE, plain
from adaptive_reasoning.report.panels import INK
from adaptive_reasoning.report.run_folder import ADAPTIVE
from adaptive_reasoning.rollout import Bias, Forced
from adaptive_reasoning.run.evaluation import ASKED, EvalSpec, Evaluator, logprobs_of
from adaptive_reasoning.tasks.task import Benchmark

CURVES = {"budget": "thinking budget", "bias": "bias on the mode's token"}  # first word of a setting: its title
PICTURE = "tradeoff.png"


@dataclass
class CurveArgs:
    """Options of the two curves."""

    budgets: str = ""
    """Thinking budgets in tokens, comma separated ("0,64,256"): measured beside the free setting, where a thinking that
    is not closed after so many tokens is closed there."""
    closing: str = ""
    """Text that closes a thinking at its budget, "\\n" for a newline; empty: as chat template or format write it."""
    answer_tokens: PositiveInt = 1024
    """Most tokens of the answer behind a thinking that was closed at its budget, within --max_new_tokens."""
    mode_bias: str = ""
    """Numbers added to the logit of the mode's token, comma separated (--mode_bias=-4,0,4, with "=" because of the
    minus): each is measured beside the free setting."""
    bias_mode: str = ""
    """Mode that --mode_bias moves; empty: nothinking (think), short (thinkless, native), long_cot (arm)."""


def values(option: str, text: str, kind: type) -> list:
    """Return the numbers of an option in rising order; raises UserError for anything else."""
    try:
        found = sorted({kind(part) for part in text.split(",")} if text else ())
    except ValueError:
        found = [math.nan]
    if not all(math.isfinite(x) and (x >= 0 or kind is float) for x in found):
        what = "whole numbers of tokens, 0 or more" if kind is int else "finite numbers"
        raise UserError(f"--{option} {text}: takes {what}, comma separated.")
    return found


def check_curves(args, form: type[ResponseFormat]) -> None:
    """Raise UserError for curves that cannot be had; nothing has to be loaded."""
    budgets, biases = values("budgets", args.budgets, int), values("mode_bias", args.mode_bias, float)
    if (budgets or biases) and issubclass(form, DialogueFormat):
        raise UserError("--budgets, --mode_bias: a dialogue has a budget a turn already, and no token of a mode.")
    if budgets and form.closing is ResponseFormat.closing and not form.chooses:
        raise UserError(
            f"--budgets: the format {args.answer_format} has no thinking to close. Take think or thinkless."
        )
    mode = args.bias_mode or form.bias_mode
    if biases and (mode not in form.modes or mode == form.malformed or form.opening is ResponseFormat.opening):
        known = ", ".join(m for m in form.modes if m != form.malformed)
        raise UserError(f"--mode_bias: needs a mode with an opening; --bias_mode {mode or 'is empty'}, modes {known}.")


def with_curves(spec: EvalSpec, form: ResponseFormat, args) -> EvalSpec:
    """Return how a format is evaluated with a setting more for every budget and bias."""
    requests = {f"budget {n}": closed_at(form, n, args) for n in values("budgets", args.budgets, int)}
    for b in values("mode_bias", args.mode_bias, float):
        requests[f"bias {b:+g}"] = {"bias": Bias(mode_opening(form, args.bias_mode or form.bias_mode), b)}
    return dataclasses.replace(spec, settings=spec.settings | dict.fromkeys(requests, ()), requests=requests)


def closed_at(form: ResponseFormat, budget: int, args) -> dict:
    """Return the options of a request whose thinking is closed behind so many tokens of it, none for a budget beyond
    the longest response. Without a thought no newline stands before the closing.

    Raises:
        UserError: the closing has no token, or no room.
    """
    given, unless, text = form.closing()
    text = args.closing.replace("\\n", "\n") or text
    ids = form.tokenizer.encode(text if budget else text.lstrip("\n"), add_special_tokens=False)
    if not ids:
        raise UserError(f"--closing {args.closing!r} has no token.")
    at = len(given) + budget
    if budget >= args.max_new_tokens:
        return {}
    if (last := args.max_new_tokens - len(given) - len(ids) - 1) < budget:
        raise UserError(
            f"--budgets {budget}: leaves no room for an answer within --max_new_tokens. Take {last} or less."
        )
    tokens = tuple((i, 1.0) for i in ids)
    return {"forced": (Forced(tokens, at, given=given, unless=unless, room=args.answer_tokens, action=False),)}


def mode_opening(form: ResponseFormat, mode: str) -> tuple[int, ...]:
    """Return the first tokens of a mode up to where its opening parts from those of all others."""
    mine = form.opening(mode)
    others = [form.opening(other) for other in form.forced_settings().values() if other != mode]
    return mine[: 1 + max((len(commonprefix([mine, other])) for other in others), default=0)]


def curve_numbers(on: Evaluator, benchmark: Benchmark, setting: str, rows: list[dict]) -> dict:
    """Return what a result of a curve has beside accuracy and tokens.

    `closed_share`: responses whose thinking was closed. `mode_prob`, `mode_prob_free`: mean probability over (the first
    512) questions that a response opens with the mode, with the bias and without, at the sampler's temperature, before
    its cut; at temperature 0 that of temperature 1.
    """
    more = on.spec.requests.get(setting, {})
    if bias := more.get("bias"):
        asked = [on.prompt_of(q) for q in benchmark.questions[:ASKED]]
        before = logprobs_of(on, asked, bias.opening[:-1]).double()
        choice = logprobs_of(on, asked, bias.opening, len(bias.opening) - 1).double()
        b = bias.amount / (on.args.temperature or 1.0)
        after = choice + b - torch.log1p(math.expm1(b) * choice.exp())
        return {
            name: float((before + p).exp().mean()) for name, p in (("mode_prob_free", choice), ("mode_prob", after))
        }
    return {"closed_share": sum(row["closed"] for row in rows) / len(rows)} if setting in on.spec.requests else {}


def curves_of(rows: list[dict]) -> dict[str, dict[str, list[tuple[str, dict]]]]:
    """Return {benchmark: {"budget" or "bias": [(value, result), ...]}} of rows of evaluation.json, in their order."""
    out: dict = {}
    for row in rows:
        kind, _, value = row["setting"].partition(" ")
        if kind in CURVES:
            out.setdefault(row["benchmark"], {}).setdefault(kind, []).append((value, row["result"]))
    return out


def curve_table(rows: list[dict]) -> str:
    """Return the curves as text: accuracy, tokens, the share of closed thinkings, and the mode's probability."""
    blocks = []
    for benchmark, kinds in curves_of(rows).items():
        for kind, points in kinds.items():
            more = {"budget": ["closed_share"], "bias": ["mode_prob_free", "mode_prob"]}[kind]
            titles = {"closed_share": "closed", "mode_prob_free": "p(mode), free", "mode_prob": "p(mode)"}
            modes = list(points[0][1]["modes"])
            lines = [[kind, "accuracy", "tokens", *(titles[m] for m in more), *modes]]
            for value, r in points:
                shares = [r["accuracy"], *(r[m] for m in more), *(r["modes"][m]["share"] for m in modes)]
                first, *others = (number(x, "share") for x in shares)
                lines.append([value, first, number(r["mean_tokens"], "tokens"), *others])
            blocks.append(f"{benchmark}: accuracy and tokens over the {CURVES[kind]}\n" + aligned(lines))
    return "\n".join(blocks)


def picture(rows: list[dict]) -> bytes:
    """Return a PNG with a panel a benchmark: both curves, the free setting and the forced modes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = curves_of(rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4 * len(found), 4.2), layout="constrained")
        for axis, (benchmark, kinds) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
            for kind, mark in zip(kinds, "o^"):
                points = [(r["mean_tokens"], r["accuracy"]) for _, r in kinds[kind]]
                bars = bars_of([r for _, r in kinds[kind]])
                axis.errorbar(*zip(*points), yerr=bars, marker=mark, elinewidth=0.8, label=CURVES[kind])
                for (value, _), at in zip(kinds[kind], points):
                    axis.annotate(
                        value,
                        at,
                        (4, -10 if kind == "budget" else 6),
                        textcoords="offset points",
                        fontsize=7.5,
                        color=INK,
                    )
            others = {row["setting"]: row["result"] for row in rows if row["benchmark"] == benchmark}
            others = {name: r for name, r in others.items() if name.split()[0] not in CURVES}
            for (name, r), mark in zip(others.items(), "sDvPX*<>"):
                colour, at = INK if name == ADAPTIVE else "white", (r["mean_tokens"], r["accuracy"])
                axis.plot(*at, mark, markersize=8, color=INK, markerfacecolor=colour, label=plain(name), zorder=0)
            axis.set(xlabel="mean tokens of a response", ylabel="accuracy", xlim=(0, None))
            axis.set_title(plain(benchmark), color=INK)
            axis.legend(loc="best")
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def bars_of(results: list[dict]) -> list[list[float]] | None:
    """Return error bars from the 95 % intervals of results, None where they have none."""
    if not all(r.get("interval") for r in results):
        return None
    lows, highs = zip(*((r["accuracy"] - r["interval"][0], r["interval"][1] - r["accuracy"]) for r in results))
    return [[max(0.0, x) for x in side] for side in (lows, highs)]


def report_curves(folder: Path, rows: list[dict]) -> None:
    """Print the curves and draw them into tradeoff.png of the folder; nothing where there are none."""
    if curves_of(rows):
        say(curve_table(rows))
        write_bytes_atomic(folder / PICTURE, picture(rows))
        say(f"wrote {folder / PICTURE}")
