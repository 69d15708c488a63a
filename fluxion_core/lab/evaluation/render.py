"""Reports as Markdown; as pictures, lab/plots/evaluation.py has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fluxion_core.lab.evaluation.agreement import AgreementRow
from fluxion_core.lab.evaluation.divergence import DivergenceRow
from fluxion_core.lab.evaluation.report import Interval, Report
from fluxion_core.lab.evaluation.work import EXACT


def markdown(title: str, report: Report, settings: Mapping[str, str]) -> str:
    """Scores, differences, bytes and notes."""
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in settings.items()), ""]
    others = [way for way in report.ways if way != EXACT]
    head = ["task", "length", "cases", *report.ways]
    rows = []
    for row in report.rows:
        mark = "" if row.is_able else " (cannot)"
        cells = [f"{row.task}{mark}", str(row.length or "own"), str(row.cases)]
        for way in report.ways:
            if way not in row.scores:
                cells.append("not run")
            elif way == EXACT:
                cells.append(f"{row.scores[way]:.1f}")
            else:
                cells.append(f"{row.scores[way]:.1f} ({_points(row.differences[way])})")
        rows.append(cells)
    if report.average_scores:
        able = sum(row.is_averaged for row in report.rows)
        cells = [f"average of {able}", "", ""]
        for way in report.ways:
            difference = report.average_differences.get(way)
            more = f" ({_points(difference)})" if difference else ""
            cells.append(f"{report.average_scores[way]:.2f}{more}")
        rows.append(cells)
    lines += table(head, rows)
    lines += ["", "In brackets: points against exact, paired, with 95 % bootstrap interval.", ""]
    if report.bytes_read:
        lines += ["## Bytes read of the retrieval region, per token", ""]
        head = ["policy", "scanned MB", "attended MB", "of exact", "of fixed(16, 5 %)", "streaming"]
        lines += table(
            head,
            [
                [
                    way,
                    f"{read.scanned / 1e6:.2f}",
                    f"{read.attended / 1e6:.2f}",
                    f"{read.of_exact:.3f}",
                    "not run" if read.of_fixed is None else f"{read.of_fixed:.2f}",
                    f"{read.streaming_share:.0%}",
                ]
                for way, read in report.bytes_read.items()
            ],
        )
        lines.append("")
    elif others:
        lines += ["No task counts, so no bytes are compared.", ""]
    lines += [f"- {note}" for note in report.notes]
    return "\n".join(lines).rstrip() + "\n"


def agreement_markdown(
    title: str, rows: Sequence[AgreementRow], settings: Mapping[str, str], notes: Sequence[str]
) -> str:
    """Agreement with `exact`, per length and policy."""
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in settings.items()), ""]
    head = ["length", "documents", "policy", "same token, fed exact's", "equal before the first"]
    head += ["first difference after", "documents without one", "bytes of exact", "streaming"]
    lines += table(
        head,
        [
            [
                str(row.length),
                str(row.documents),
                row.way,
                _share(row.forced_share),
                _share(row.equal_share),
                f"{row.first_divergence:.1f}",
                f"{row.fully_equal:.0%}",
                f"{row.of_exact:.3f}",
                f"{row.streaming_share:.0%}",
            ]
            for row in rows
        ],
    )
    lines += ["", "In brackets: 95 % bootstrap interval over documents.", ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes)]).rstrip() + "\n"


def divergence_markdown(
    title: str, rows: Sequence[DivergenceRow], settings: Mapping[str, str], notes: Sequence[str]
) -> str:
    """Divergence from `exact`, per length and policy."""
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in settings.items()), ""]
    head = ["length", "documents", "steps", "policy", "bytes of exact", "of fixed(16, 5 %)"]
    head += ["KL, nats", "by a twentieth of the steps", "same token"]
    lines += table(
        head,
        [
            [
                str(row.length),
                str(row.documents),
                str(row.steps),
                row.way,
                f"{row.of_exact:.3f}",
                "not run" if row.of_fixed is None else f"{row.of_fixed:.2f}",
                _share(row.divergence, digits=4),
                f"{row.largest_twentieth:.0%}",
                _share(row.same_token),
            ]
            for row in rows
        ],
    )
    lines += ["", "In brackets: 95 % bootstrap interval over documents.", ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes)]).rstrip() + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [
        f"| {' | '.join(head)} |",
        f"|{'|'.join('---' for _ in head)}|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def _share(interval: Interval, *, digits: int = 3) -> str:
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _points(difference: Interval) -> str:
    return f"{difference.mean:+.1f} [{difference.low:+.1f}, {difference.high:+.1f}]"
