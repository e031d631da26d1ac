"""A report as one HTML file that needs nothing else: no script, no request, light and dark."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from artifacts.evaluation.plots import baseline_plot, dose_plot, layer_plot
from artifacts.evaluation.schema import ConditionResult, Report, write_text
from artifacts.evaluation.statistics import Interval

# Refuses every request, should a text ever escape the escaping.
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE: Final = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #5c6570; --line: #d5dae0; --back: #ffffff; --card: #f5f7f9;
  --good: #1e7a48; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #9aa3ad; --line: #39414a; --back: #14171b;
  --card: #1d2227; --good: #5cc58d; --bad: #ff8a80 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.soft { color: var(--soft) } .good { color: var(--good) } .bad { color: var(--bad); font-weight: 600 }
.cards { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.2rem 0 }
.card { background: var(--card); border-radius: .5rem; padding: .6rem .9rem; min-width: 8rem }
.card b { display: block; font-size: 1.35rem }
.scroll { overflow-x: auto } svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right } td.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 20rem }
code { font-size: .85em; overflow-wrap: anywhere }
"""


def write_html(path: Path, report: Report) -> None:
    """Write the page atomically."""
    write_text(path, render_html(report))


def render_html(report: Report) -> str:
    """The whole page. Every text of the report is escaped: names, questions and answers may be hostile."""
    title = f"Evaluation of {report.about.name}"
    body = "".join(
        (
            f"<h1>{escape(title)}</h1>",
            _subject(report),
            _cards(report),
            _gates(report),
            _missing(report),
            _section("Dose-response", _scroll(dose_plot(report)) + _dose_note(report)),
            _section("Baselines", _scroll(baseline_plot(report)) + _draws_table(report) + _comparison_table(report)),
            _layers(report),
            _section("All conditions", _condition_table(report)),
            _examples(report),
            _section("How it was measured", _method(report)),
        )
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>{body}</body></html>\n'
    )


def _subject(report: Report) -> str:
    about = report.about
    layers = ", ".join(map(str, about.layers)) or "-"
    parts = [f"{key} {value}" for key, value in about.subject.items()]
    parts += [f"strength {about.recommended:g} (at most {about.maximum:g})", f"layers {layers}", f"scope {about.scope}"]
    return f'<p class="soft">{escape(" · ".join(parts))}</p>'


def _cards(report: Report) -> str:
    figures = report.figures
    shown = [("unsteered", "off"), ("steered", "on"), ("random directions, mean", "random.mean")]
    shown += [
        ("untrained expert", "untrained"),
        ("target's own direction", "own"),
        ("prompt only", "prompt"),
        ("expert", "expert"),
    ]
    cards = [(title, f"{figures[name]:.3f}") for title, name in shown if name in figures]
    shares = [("perplexity", "perplexity_ratio", "x{:.3f}"), ("retention", "retention", "{:.3f}")]
    shares += [("gap to the prompt closed", "gap_closed.prompt", "{:.0%}")]
    shares += [("gap to the expert closed", "gap_closed.expert", "{:.0%}"), ("judge (0 to 2)", "axbench", "{:.2f}")]
    cards += [(title, form.format(figures[name])) for title, name, form in shares if name in figures]
    items = "".join(
        f'<div class="card"><span class="soft">{escape(t)}</span><b>{escape(v)}</b></div>' for t, v in cards
    )
    return f'<div class="cards">{items}</div>'


def _gates(report: Report) -> str:
    if not report.gates:
        return ""
    rows = [
        [
            f'<span class="{"good" if each.passed else "bad"}">{"passed" if each.passed else "FAILED"}</span>',
            f"<code>{escape(each.gate)}</code>",
            escape(each.reason) if each.figure is None else f"{each.figure:.4g}",
            "" if each.bound is None else f"{each.bound:.4g}",
        ]
        for each in report.gates
    ]
    return _section("Gates", _table(["", "gate", "figure", "bound"], rows, numbers=(2, 3)))


def _missing(report: Report) -> str:
    if not report.not_measured:
        return ""
    rows = [[escape(name), escape(reason)] for name, reason in report.not_measured.items()]
    note = '<p class="bad">A steering figure says little without these.</p>'
    return _section("Not measured", note + _table(["baseline", "why"], rows))


def _dose_note(report: Report) -> str:
    response = report.dose_response
    if response.rho is None:
        return '<p class="soft">No correlation: the accuracy does not change, or there are too few strengths.</p>'
    return (
        f'<p class="soft">Spearman over all strengths from 0 to the maximum: {response.rho:+.2f} '
        f"(p = {response.p_value:.2g}).</p>"
    )


def _draws_table(report: Report) -> str:
    rows = [
        [
            escape(each.name),
            str(each.count),
            _interval(each.mean),
            f"{each.minimum:.3f} to {each.maximum:.3f}",
            _interval(each.difference, signed=True),
            f"{each.p_value:.3g}",
        ]
        for each in report.draws
    ]
    header = ["chance", "draws", "mean accuracy", "range", "steered minus mean", "rank p"]
    return _table(header, rows, numbers=(1, 2, 3, 4, 5)) if rows else ""


def _comparison_table(report: Report) -> str:
    rows = [
        [
            escape(each.against),
            _interval(each.difference, signed=True),
            str(each.on_only),
            str(each.other_only),
            f"{each.p_value:.2g}",
            f"{each.p_holm:.2g}",
        ]
        for each in report.comparisons
    ]
    header = ["steered against", "difference", "only steered right", "only other right", "McNemar p", "Holm p"]
    return _table(header, rows, numbers=(1, 2, 3, 4, 5)) if rows else ""


def _layers(report: Report) -> str:
    maps = (("held_out", "gain on the tuning split"), ("mi", "mutual information, nats"), ("r2", "aligner held-out R²"))
    drawn = [(label, layer_plot(report.pairs, key, label)) for key, label in maps]
    shown = "".join(f"<h3>{escape(label)}</h3>{_scroll(svg)}" for label, svg in drawn if svg is not None)
    return _section("Layers", shown) if shown else ""


def _condition_table(report: Report) -> str:
    header = [
        "condition",
        "strength",
        "accuracy",
        "log-likelihood",
        "perplexity",
        "retention",
        "CLaS",
        "judge",
        "failed",
    ]
    shown = [each for each in report.conditions if each.kind != "random"]
    rows = [
        [
            escape(each.name),
            f"{each.strength:g}" if each.vector else "-",
            _interval(each.accuracy),
            _maybe(each.likelihood),
            "-" if each.perplexity_ratio is None else f"x{_interval(each.perplexity_ratio)}",
            "-" if each.retention is None else _interval(each.retention),
            _maybe(each.clas),
            *_judge_cells(each),
        ]
        for each in shown
    ]
    return _table(header, rows, numbers=tuple(range(1, len(header))))


def _judge_cells(condition: ConditionResult) -> tuple[str, str]:
    judge = condition.judge
    if judge is None:
        return "-", "-"
    return "-" if judge.overall is None else _interval(judge.overall), f"{judge.failed} of {len(judge.scores)}"


def _examples(report: Report) -> str:
    if not report.examples:
        return ""
    names = list(dict.fromkeys(name for each in report.examples for name in each.answers))
    rows = [
        [escape(each.question), escape(each.expected), *(escape(each.answers.get(name, "-")) for name in names)]
        for each in report.examples
    ]
    note = '<p class="soft">Spread evenly over the file, not chosen by their answers.</p>'
    texts = range(2 + len(names))
    return _section("Answers", note + _table(["question", "expected", *names], rows, texts=tuple(texts)))


def _method(report: Report) -> str:
    settings, about = report.settings, report.about
    target = sum(each.task == "target" for each in report.questions)
    kept = sum(each.task == "retention" for each in report.questions)
    neutral = len(report.questions) - target - kept
    agreement = [each.agreement for each in report.conditions if each.agreement is not None]
    rows = [
        ["questions", f"{target} target, {kept} retention, {neutral} neutral texts of {sum(report.tokens)} tokens"],
        [
            "exact answers by",
            settings.exact + (f" (agrees with generation: {min(agreement):.3f})" if agreement else ""),
        ],
        ["intervals", "95 %, bootstrap over groups of questions; exact binomial at 0 and 1"],
        ["tests", "exact McNemar on the same questions, Holm over all; chance by the rank of the steered accuracy"],
        ["CLaS", "harmonic mean of accuracy and retention (at most 1)"],
        ["seed", str(settings.seed)],
        ["system prompt of the prompt-only baseline", settings.prompt or "-"],
        ["bundle", about.bundle or "-"],
        *(["data", f"{file.path} sha256:{file.digest}"] for file in report.data),
        ["versions", ", ".join(f"{name} {number}" for name, number in about.versions.items()) or "-"],
    ]
    return _table(["", ""], [[escape(key), f"<code>{escape(value)}</code>"] for key, value in rows])


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}"


def _scroll(content: str) -> str:
    return f'<div class="scroll">{content}</div>'


def _table(
    header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), texts: Sequence[int] = ()
) -> str:
    """A table of cells that are HTML already."""

    def cells(values: Sequence[str], tag: str) -> str:
        kinds = ["n" if place in numbers else "text" if place in texts else "" for place in range(len(values))]
        marks = [f' class="{kind}"' if kind else "" for kind in kinds]
        return "".join(f"<{tag}{mark}>{value}</{tag}>" for mark, value in zip(marks, values, strict=True))

    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return _scroll(f"<table><tr>{cells([escape(each) for each in header], 'th')}</tr>{lines}</table>")


def _interval(each: Interval, signed: bool = False) -> str:
    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if signed else "{:.3f} [{:.3f}, {:.3f}]"
    return form.format(*each)


def _maybe(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
