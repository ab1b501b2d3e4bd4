"""A benchmark's result as Markdown and as one HTML page that opens offline, pictures and charts inside it.

run_benchmark(config) -> dict -> write_reports(result, folder) -> report.md, report.html
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gigdiff.benchmark import BENCHMARK_VERSION, pareto_front
from gigdiff.errors import InputError, MissingDependencyError
from gigdiff.evaluation import write_text

__all__ = ["METRICS", "Metric", "read_result", "to_html", "to_markdown", "write_reports"]

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Metric:
    """How a score is shown and read. `better`: 1 = larger is better, -1 = smaller, 0 = neither by itself."""

    label: str
    better: int
    digits: int
    meaning: str


#: Score name -> how it is shown; tables have this order.
METRICS: dict[str, Metric] = {
    "article_type": Metric("type right", 1, 3, "share of images that a classifier reads as the article type asked for"),
    "article_type_ratio": Metric("type / real", 1, 3, "that over the same classifier's share on the real photos"),
    "colour_group": Metric("colour right", 1, 3, "share read as the colour group asked for"),
    "colour_group_ratio": Metric("colour / real", 1, 3, "that over the share on the real photos"),
    "colour_difference": Metric("ΔE to colour", -1, 1, "CIEDE2000 of the foreground to the colour that was named"),
    "gender": Metric("gender right", 1, 3, "share read as for whom it was asked"),
    "gender_ratio": Metric("gender / real", 1, 3, "that over the share on the real photos"),
    "frechet_distance": Metric("Fréchet", -1, 1, "Fréchet distance to the real photos; larger with fewer images"),
    "frechet_ratio": Metric("Fréchet / real", -1, 2, "that over real photos against real photos at the same count"),
    "frechet_infinite": Metric("Fréchet ∞", -1, 1, "extrapolated to infinitely many drawn images"),
    "kernel_distance": Metric("kernel", -1, 4, "kernel distance (KID); unbiased, may be below 0"),
    "inception_score": Metric("IS", 1, 2, "Inception Score over the article types; compares with nothing real"),
    "precision": Metric("precision", 1, 3, "share of drawn images among the real ones"),
    "recall": Metric("recall", 1, 3, "share of real photos among the drawn ones"),
    "density": Metric("density", 1, 3, "how deep among the real photos; may exceed 1"),
    "coverage": Metric("coverage", 1, 3, "share of real photos with a drawn image near"),
    "vendi_score": Metric("Vendi", 0, 1, "effective number of different images; read it beside the real photos'"),
    "copied": Metric("copied", -1, 3, "share much nearer to one train photo than to any of another product"),
    "copy_ratio": Metric("copy ratio", 1, 3, "median of nearest over second nearest; 0 = exact copies"),
    "clip_score": Metric("CLIP", 1, 2, "100 x cosine of image and prompt"),
}
# What the first table shows; the whole is in the tables of each set of prompts.
SUMMARY = ("article_type_ratio", "colour_group_ratio", "frechet_ratio", "recall", "copied")
CONTROLS = {
    "real": "real photos: attributes of the same products' photos (ceiling), distances of train photos (floor)",
    "neighbour": "nearest train photo of each product as a “generator”: what a copier would score",
    "shuffled": "the row's images against other products' attributes (floor)",
    "reconstructed": "the real photos through the row's own autoencoder",
}
SHOWN_CLASSES = 15


def read_result(path: str | Path) -> dict[str, Any]:
    """A benchmark.json of this version.

    Raises:
        InputError: no such file, no benchmark, or one of another version.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as a benchmark report ({error}); give a benchmark.json") from error
    if not isinstance(result, dict) or "benchmark_version" not in result:
        raise InputError(f"{path} is no benchmark report; give the benchmark.json that `gigdiff bench` wrote")
    if result["benchmark_version"] != BENCHMARK_VERSION:
        raise InputError(
            f"{path} is a report of version {result['benchmark_version']}, this gigdiff reads version "
            f"{BENCHMARK_VERSION}; run the benchmark again with this gigdiff"
        )
    return result


def write_reports(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """report.md and report.html beside benchmark.json, from the pictures in `folder`."""
    return [
        write_text(folder / "report.md", to_markdown(result)),
        write_text(folder / "report.html", to_html(result, folder)),
    ]


# ---- Markdown --------------------------------------------------------------------------------------------------------


def to_markdown(result: Mapping[str, Any]) -> str:
    """Tables without pictures: for a repository and a terminal."""
    lines = [f"# {result['title']}", "", *_made_by(result), "", "## Rows", ""]
    header, table = summary_table(result)
    lines += _markdown_table(header, table)
    for prompts in prompt_sets(result):
        lines += ["", f"## Quality, prompts: {prompts}", ""]
        header, table = quality_table(result, prompts)
        lines += _markdown_table(header, table)
    lines += ["", "## Speed", ""]
    header, table = speed_table(result)
    lines += _markdown_table(header, table)
    lines += ["", "## How to read it", ""]
    lines += [f"- **{m.label}**: {m.meaning} ({_direction(m)})" for m in METRICS.values()]
    lines += [f"- *{name}*: {text}" for name, text in CONTROLS.items()]
    lines += ["", "## How to reproduce", "", *(f"    {line}" for line in reproduce(result)), ""]
    return "\n".join(lines)


def _markdown_table(header: Sequence[str], table: Sequence[Sequence[str]]) -> list[str]:
    align = ["---"] + ["---:"] * (len(header) - 1)
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, align, *table)]
    return [f"| {' | '.join(row)} |" for row in rows]


# ---- HTML ------------------------------------------------------------------------------------------------------------


def to_html(result: Mapping[str, Any], folder: Path) -> str:
    """One page with everything inside: no script, no font, no picture is loaded from anywhere.

    Raises:
        MissingDependencyError: without jinja2 and matplotlib.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingDependencyError("the HTML report needs jinja2: pip install 'gigdiff[eval]'") from error
    page = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return page.get_template("report.html.j2").render(
        result=result,
        made_by=_made_by(result),
        charts=charts(result),
        summary=summary_table(result),
        quality=[(prompts, quality_table(result, prompts), notes(result, prompts)) for prompts in prompt_sets(result)],
        speed=speed_table(result),
        grid=_grid(result, folder),
        confusions=_confusions(result),
        copies=_copies(result, folder),
        metrics=[(metric.label, metric.meaning, _direction(metric)) for metric in METRICS.values()],
        controls=CONTROLS,
        reproduce="\n".join(reproduce(result)),
    )


def charts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(caption, SVG) of quality against throughput, one for each quality; empty where no row has both."""
    wanted = (
        ("frechet_ratio", "Fréchet distance over real photos’ own (1 = like real photos)"),
        ("article_type_ratio", "Article type right, over real photos (1 = like real photos)"),
        ("colour_group_ratio", "Colour right, over real photos (1 = like real photos)"),
    )
    first = next(iter(prompt_sets(result)), None)
    made = []
    for name, label in wanted:
        points = []
        for row in result["rows"]:
            score = row["quality"].get(first, {}).get("scores", {}).get(name)
            if score and row["speed"] and "best" in row["speed"]:
                points.append((row["name"], row["speed"]["best"], score))
        if points:
            made.append((f"{label}, prompts: {first}", _chart(points, label, METRICS[name].better)))
    return made


def _chart(points: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]], label: str, better: int) -> str:
    """Images a second (the best batch) across, quality up; the Pareto front drawn through."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError as error:
        raise MissingDependencyError("the charts need matplotlib: pip install 'gigdiff[eval]'") from error
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.add_subplot()
    x, y = [point[1]["value"] for point in points], [point[2]["value"] for point in points]
    front = pareto_front([(a, b * better) for a, b in zip(x, y, strict=True)])
    edge = sorted(front, key=lambda i: x[i])
    axes.plot(
        [x[i] for i in edge], [y[i] for i in edge], "--", color="#c2410c", linewidth=1, label="Pareto front", zorder=1
    )
    for i, (name, speed, score) in enumerate(points):
        colour = "#c2410c" if i in front else "#64748b"
        low = score["low"] if score["low"] is not None else y[i]
        high = score["high"] if score["high"] is not None else y[i]
        axes.errorbar(
            x[i], y[i], xerr=[[x[i] - speed["low"]], [speed["high"] - x[i]]], yerr=[[y[i] - low], [high - y[i]]],
            fmt="o", color=colour, ecolor="#cbd5e1", capsize=2, markersize=6, zorder=2,
        )  # fmt: skip
        # Away from the nearest neighbour, so that names do not print over each other.
        others = [k for k in range(len(points)) if k != i]
        near = min(others, key=lambda k: abs(math.log(x[k] / x[i])), default=i)
        above = (y[i] - y[near]) * better >= 0
        axes.annotate(
            name,
            (x[i], y[i]),
            xytext=(5, 7 if above else -13),
            textcoords="offset points",
            fontsize=8.5,
            color="#1e293b",
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else ""))
    axes.margins(0.16, 0.14)
    if better < 0:
        axes.invert_yaxis()  # up is better in every chart
    axes.set_xlabel("images a second, at the best batch size (log scale; bars: range over repetitions)")
    axes.set_title(label, loc="left", fontsize=10.5)
    axes.grid(True, which="major", color="#e2e8f0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(front) > 1:
        axes.legend(frameon=False, loc="best", fontsize=8.5)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "gigdiff", "svg.fonttype": "none"}):  # text stays text
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _grid(result: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Column names, and for each prompt its pictures as data URIs ("" where a row has none)."""
    rows = [row for row in result["rows"] if row.get("grid")]
    prompts = list(dict.fromkeys(prompt for row in rows for prompt in row["grid"]))
    return {
        "columns": [row["name"] for row in rows],
        "seeds": result["config"]["grid_seeds"],
        "rows": [
            (p, [_data_uri(folder / row["grid"][p]) if p in row["grid"] else "" for row in rows]) for p in prompts
        ],
    }


def _copies(result: Mapping[str, Any], folder: Path) -> list[tuple[str, str, str]]:
    """(row, prompts, data URI) of each sheet of closest train photos."""
    from gigdiff.benchmark import slug

    found = []
    for row in result["rows"]:
        for prompts in row["quality"]:
            path = folder / "pictures" / slug(row["name"]) / f"closest-{prompts}.png"
            if row["quality"][prompts]["closest"] and path.is_file():
                found.append((row["name"], prompts, _data_uri(path)))
    return found


def _data_uri(path: Path) -> str:
    try:
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise InputError(f"the report's picture {path} is missing ({error}); run the benchmark again") from error


def _confusions(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each row, its first prompts and each attribute: what was asked, how often right, what was read instead."""
    found = []
    for row in result["rows"]:
        for prompts, quality in list(row["quality"].items())[:1]:
            for attribute, table in quality["confusion"].items():
                lines = []
                for asked, read in list(table.items())[:SHOWN_CLASSES]:
                    count = sum(read.values())
                    real = quality["real_confusion"].get(attribute, {}).get(asked, {})
                    others = [(name, n) for name, n in read.items() if name != asked][:3]
                    lines.append({
                        "asked": asked, "count": count, "right": read.get(asked, 0) / count,
                        "real": real.get(asked, 0) / sum(real.values()) if real else None,
                        "instead": ", ".join(f"{name} {n}" for name, n in others),
                    })  # fmt: skip
                matrix = _matrix(table) if attribute == "colour_group" else None
                found.append({"row": row["name"], "prompts": prompts, "attribute": attribute, "lines": lines,
                              "left_out": max(0, len(table) - SHOWN_CLASSES), "matrix": matrix})  # fmt: skip
    return found


def _matrix(table: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Asked down, read across, each cell (images, share of the row)."""
    names = sorted({*table, *(read for row in table.values() for read in row)})
    lines = []
    for asked in names:
        count = sum(table.get(asked, {}).values())
        cells = [table.get(asked, {}).get(read, 0) for read in names]
        lines.append((asked, [(n, n / count if count else 0.0) for n in cells]))
    return {"names": names, "lines": lines}


# ---- tables ----------------------------------------------------------------------------------------------------------

Table = tuple[list[str], list[list[str]]]


def prompt_sets(result: Mapping[str, Any]) -> list[str]:
    """The sets that any row was asked, in the order of the rows."""
    return list(dict.fromkeys(prompts for row in result["rows"] for prompts in row["quality"]))


def summary_table(result: Mapping[str, Any]) -> Table:
    """One line a row: what it is, how good, how fast, how large; a row without numbers says why."""
    first = next(iter(prompt_sets(result)), "")
    quality = [METRICS[name].label for name in SUMMARY]
    header = [
        "row",
        "family",
        *quality,
        "diversity",
        "images/s",
        "p50 latency",
        "parameters",
        "on disk",
        "training cost",
    ]
    table = []
    for row in result["rows"]:
        if row["status"] != "ok":
            table.append([row["name"], row["family"], f"{row['status']}: {row['reason']}", *[""] * (len(header) - 3)])
            continue
        scores = row["quality"].get(first, {}).get("scores", {})
        speed = row["speed"] if row["speed"] and "best" in row["speed"] else None
        table.append([
            row["name"],
            row["family"],
            *(_score(scores.get(name), METRICS[name].digits) for name in SUMMARY),
            _score(row.get("diversity"), 3),
            f"{_number(speed['best']['value'])} (batch {speed['best']['batch_size']})" if speed else "not measured",
            _seconds(speed["latency"]["p50"]) if speed else "not measured",
            _count(row["parameters"]),
            _bytes(row["bytes_on_disk"]),
            row["training_cost"] or "not known",
        ])  # fmt: skip
    return header, table


def quality_table(result: Mapping[str, Any], prompts: str) -> Table:
    """Every score with its interval, rows and then their controls."""
    rows = [row for row in result["rows"] if prompts in row["quality"]]
    names = [name for name in METRICS if any(name in row["quality"][prompts]["scores"] for row in rows)]
    header = ["row", "images x seeds", *(f"{METRICS[name].label} {_arrow(METRICS[name])}".strip() for name in names)]
    table, shown = [], set()
    for row in rows:
        quality = row["quality"][prompts]
        size = f"{quality['count']} x {len(quality['seeds'])}"
        scores = [_score(quality["scores"].get(name), METRICS[name].digits, long=True) for name in names]
        table.append([row["name"], size, *scores])
    for kind in CONTROLS:
        for row in rows:
            controls = row["quality"][prompts]["controls"]
            cells = [_score(controls.get(f"{kind}_{name}"), METRICS[name].digits, long=True) for name in names]
            # Real photos and neighbours are the same whatever the row, reconstructions whatever its settings.
            whose = {"real": "", "neighbour": "", "reconstructed": f", {row['model']}"}.get(kind, f", {row['name']}")
            label = f"control: {kind}{whose}"
            if any(cells) and label not in shown:
                shown.add(label)
                table.append([label, "", *cells])
    return header, table


def notes(result: Mapping[str, Any], prompts: str) -> list[str]:
    """What rows had to say of these prompts, the same words once for all rows that said them."""
    said: dict[str, list[str]] = {}
    for row in result["rows"]:
        for note in row["quality"].get(prompts, {}).get("notes", []):
            said.setdefault(note, []).append(row["name"])
    return [f"{', '.join(names)}: {note}" for note, names in said.items()]


def speed_table(result: Mapping[str, Any]) -> Table:
    """Throughput at each batch size, latency, cold start, memory."""
    measured = [row for row in result["rows"] if row["speed"] and "best" in row["speed"]]
    sizes = sorted({int(size) for row in measured for size in (*row["speed"]["throughput"], *row["speed"]["failed"])})
    header = ["row", *(f"images/s, batch {size}" for size in sizes), "latency p50", "p95", "p99", "first image, cold",
              "host memory", "CUDA memory"]  # fmt: skip
    table = []
    for row in result["rows"]:
        speed = row["speed"]
        if not speed or "best" not in speed:
            why = row["reason"] or (speed or {}).get("reason") or "not measured"
            table.append([row["name"], why, *[""] * (len(header) - 2)])
            continue
        cells = []
        for size in map(str, sizes):
            found = speed["throughput"].get(size)
            cells.append(_score(found, 2, long=True) if found else speed["failed"].get(size, "not measured"))
        latency = speed["latency"]
        table.append([
            row["name"], *cells, *(_seconds(latency[p]) for p in ("p50", "p95", "p99")),
            f"{_seconds(speed['first_image']['value'])}",
            _bytes(speed["host_bytes"]), _bytes(speed["cuda_bytes"]) if speed["cuda_bytes"] else "no GPU",
        ])  # fmt: skip
    return header, table


def reproduce(result: Mapping[str, Any]) -> list[str]:
    """The commands that make this report again."""
    return [
        f"git checkout {(result['environment']['git_commit'] or '<unknown commit>').removesuffix('-dirty')}",
        'pip install -c constraints.txt -e ".[eval]"',
        f"gigdiff bench --config {result.get('config_file') or 'CONFIG.yaml'}",
    ]


def _made_by(result: Mapping[str, Any]) -> list[str]:
    about, config = result["environment"], result["config"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    averages = " to ".join("?" if value is None else f"{value:.1f}" for value in about["load_average"])
    return [
        f"- {result['created']}, {result['seconds'] / 60:.0f} minutes ({result['cells']['made']} cells made, "
        f"{result['cells']['kept']} kept from before)",
        f"- {config['count']} validation products of {result['data']}, seeds {', '.join(map(str, config['seeds']))}; "
        f"drawn images brought to {result['height']} x {result['width']} (height x width)",
        f"- distances over {result['extractor']}: {result['resize']}. Not comparable under another extractor or count.",
        f"- {about['processor']}, {about['cores']} cores, {about['threads']} threads, GPU: {about['cuda'] or 'none'}; "
        f"load average {averages}",
        f"- {versions}",
        f"- git commit {about['git_commit'] or 'unknown'}",
    ]


def _direction(metric: Metric) -> str:
    return {1: "larger is better", -1: "smaller is better", 0: "neither is better by itself"}[metric.better]


def _arrow(metric: Metric) -> str:
    return {1: "↑", -1: "↓", 0: ""}[metric.better]


def _score(score: Mapping[str, Any] | None, digits: int, long: bool = False) -> str:
    """A value, and with `long` its interval."""
    if not score or score["value"] is None:
        return ""
    text = f"{score['value']:.{digits}f}"
    if long and score["low"] is not None:
        text += f" ({score['low']:.{digits}f} to {score['high']:.{digits}f})"
    return text


def _number(value: float) -> str:
    return f"{value:.3g}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f} M"


def _bytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
