#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Merges the output of xattn_bench and bench_peers.py into src/bench/results.json, and writes from it the table between the markers in
src/bench/README.md and the plots beside it. For scripts/bench.sh.

    --blocks        instead results-blocks.json and the table of blocks, without plots
    --avx2          instead results-avx2.json, their table and ratios-avx2.svg
    --crossover     instead crossover.json and its plot; with --avx2, crossover-avx2.json
    --device cuda   instead results-cuda.json, and prints the table

    .venv-bench/bin/python scripts/bench_report.py [FILE ...]

Each FILE is the output of one process; names that differ only in the number before the first dot are passes of the same measurement.
Rows that are in no file keep their entries in results.json. Without files, the table and plots are written from results.json alone.

results.json: {date, machine, versions, peaks: {threads: 1e9 operations a second}, regret: {threads: rows},
  rows: {row: {weights: {threads: {"runtime, candidate": [passes: [us, low, high]]}}}}}; for a GPU results-cuda.json. With --blocks
  also context_bytes: {row: {"runtime, candidate": bytes}}. crossover.json: {machine, date, crossover: {threads: cells}}.
"""

import argparse
import datetime
import json
import math
import re
import statistics
from pathlib import Path

from peers.blocks import read_blocks
from peers.layer import read_shapes

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "src" / "bench"
OURS = {"frozen": "libtorch, frozen", "module": "libtorch, module", "by hand": "libtorch, folded"}
HALF = "libtorch, frozen, bfloat16"  # also ours: weights and context are stored in bfloat16
SHARED = "libtorch, frozen, shared"  # also ours: contexts are the caller's tensor
OURS_OF_BLOCKS = {"frozen": "libtorch, frozen", "bfloat16": HALF, "module": "libtorch, module"}
NAMES = {
    "libtorch, eager": "LibTorch, eager",
    "libtorch, sdpa": "LibTorch, SDPA",
    "libtorch, mha": "LibTorch, MultiheadAttention",
    "pytorch": "PyTorch",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "cuda": "PyTorch",
}


def rounded(x):
    return float(f"{x:.4g}")


# ---- Merging -----------------------------------------------------------------------------------------------------------------


def merge(store, files):
    """Adds the files to the stored results; new measurements of a row replace its old ones."""
    parts = [json.loads(path.read_text()) for path in files]
    machine = next((part["machine"] for part in parts if "machine" in part), None)
    if machine and machine != store.get("machine"):
        store.clear()  # ratios are valid on one machine only
    if machine:
        store["machine"] = machine
    store["date"] = datetime.date.today().isoformat()
    rows = store.setdefault("rows", {})
    fresh = {(r["row"], r["weights"], str(r["threads"])) for part in parts for r in part["results"]}
    for row, weights, threads in fresh:
        rows.setdefault(row, {}).setdefault(weights, {})[threads] = {}
    for part in parts:
        store.setdefault("versions", {}).update(part.get("versions", {}))
        store.setdefault("peaks", {}).update(part.get("peaks", {}))
        store.setdefault("regret", {}).update(part.get("regret", {}))
        for r in part["results"]:
            name = f"{r['runtime']}, {r['candidate']}"
            passes = rows[r["row"]][r["weights"]][str(r["threads"])].setdefault(name, [])
            passes.append([rounded(r[key]) for key in ("us", "low", "high")])
            if "context_bytes" in r:
                store.setdefault("context_bytes", {}).setdefault(r["row"], {})[name] = r["context_bytes"]


def dump(store):
    """JSON with one line for each row, weights and threads."""
    rows = store.pop("rows")
    text = json.dumps(store, indent=1)[:-2] + ',\n "rows": {'
    lines = []
    for row, by_weights in rows.items():
        inner = [
            f"   {json.dumps(w)}: {{" + ",".join(f"\n    {json.dumps(t)}: {json.dumps(c)}" for t, c in by_threads.items()) + "}"
            for w, by_threads in by_weights.items()
        ]
        lines.append(f"\n  {json.dumps(row)}: {{\n" + ",\n".join(inner) + "}")
    store["rows"] = rows
    return text + ",".join(lines) + "}\n}\n"


# ---- Ratios ------------------------------------------------------------------------------------------------------------------


def median(passes):
    return statistics.median(p[0] for p in passes)


def fastest_peer(cell):
    """Name and passes of the fastest candidate that is not ours; None if there is none."""
    peers = {name: passes for name, passes in cell.items() if name not in (*OURS.values(), HALF, SHARED)}
    return min(peers.items(), key=lambda item: median(item[1])) if peers else None


def ratio(peer, ours):
    """How many times faster ours is by the medians, and the range that the spread of both allows: the least and greatest median of
    several passes, or the quartiles of one pass."""
    low_peer, high_peer, low_ours, high_ours = *spread(peer), *spread(ours)
    return median(peer) / median(ours), low_peer / high_ours, high_peer / low_ours


def spread(passes):
    if len(passes) == 1:
        return passes[0][1:]
    return min(p[0] for p in passes), max(p[0] for p in passes)


def label(name):
    runtime, candidate = name.split(", ", 1)
    if name in NAMES:
        return NAMES[name]
    return f"{NAMES.get(runtime, runtime)}"


def time_text(us):
    return f"{us / 1e6:.3g} s" if us >= 1e6 else f"{us / 1e3:.3g} ms" if us >= 1e3 else f"{us:.3g} µs"


# ---- Tables ------------------------------------------------------------------------------------------------------------------


def ratio_text(peer, ours, spread=False):
    if ours is None:
        return "–"
    middle, least, most = ratio(peer, ours)
    text = f"{middle:.3g}" if middle >= 10 else f"{middle:.2f}"
    text = f"**{text}** ▼" if middle < 1 else text
    digits = lambda x: f"{x:.3g}" if x >= 10 else f"{x:.2f}"
    return f"{text} ({digits(least)}–{digits(most)})" if spread else text


def table(store, shapes, columns=OURS):
    threads = sorted({t for row in store["rows"].values() for t in row.get("none", {})}, key=int)
    head, line = "| layer |", "|---|"
    for t in threads:
        head += f" fastest other, {t} thread{'s' * (t != '1')} | {' | '.join(columns)} |"
        line += "---|" * (1 + len(columns))
    lines = [head, line]
    for shape in shapes:
        by_threads = store["rows"].get(shape["name"], {}).get("none", {})
        cells = []
        for t in threads:
            peer = fastest_peer(by_threads.get(t, {}))
            if peer is None:
                cells += ["–"] * (1 + len(columns))
                continue
            name, passes = peer
            cells.append(f"{time_text(median(passes))} {label(name)}")
            cells += [ratio_text(passes, by_threads[t].get(ours), spread=column == "frozen") for column, ours in columns.items()]
        if any(cell != "–" for cell in cells):
            lines.append(f"| {shape['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_of_ours(shape, cell):
    """`frozen`, or with gradients `module`."""
    return cell.get(OURS["module" if shape.get("timed") == "backward" else "frozen"])


def ratios(store, shapes, threads):
    """{row: how many times faster than the fastest other runtime}, for the rows that both have."""
    found = {}
    for shape in shapes:
        cell = store["rows"].get(shape["name"], {}).get("none", {}).get(threads, {})
        peer, ours = fastest_peer(cell), best_of_ours(shape, cell)
        if peer and ours:
            found[shape["name"]] = ratio(peer[1], ours)[0]
    return found


def goals(store, shapes):
    """{threads: list of (row, ratio that it reached, its goal in shapes.csv)}."""
    found = {}
    for i, threads in enumerate(("1", "2")):
        reached = ratios(store, shapes, threads)
        found[threads] = [
            (shape["name"], reached[shape["name"]], float(shape["goal"].split("/")[i]))
            for shape in shapes
            if shape.get("goal") and shape["name"] in reached
        ]
    return found


def summary(store, shapes):
    """In how many rows ours is faster, by how much, and which goals it reaches."""
    lines = []
    for t in sorted(store.get("peaks", {}) or {"1": 0}, key=int):
        reached = ratios(store, shapes, t)
        if reached:
            mean = math.exp(statistics.fmean(math.log(x) for x in reached.values()))
            ahead = sum(x >= 1 for x in reached.values())
            lines.append(f"With {t} thread{'s' * (t != '1')}: faster than the fastest other in {ahead} of {len(reached)} rows, "
                         f"geometric mean of the ratios {mean:.2f}, least {min(reached.values()):.2f}, most {max(reached.values()):.3g}.")
        wanted = goals(store, shapes).get(t, [])
        if wanted:
            missed = [f"{name} ({x:.2f} of {goal:.2f})" for name, x, goal in wanted if x < goal]
            lines[-1] += f" Goals reached: {len(wanted) - len(missed)} of {len(wanted)}"
            lines[-1] += f"; missed: {', '.join(missed)}." if missed else "."
        regret = [row["us"] / row["best_us"] - 1 for row in store.get("regret", {}).get(t, [])]
        if regret:
            lines[-1] += (
                f" The orders that a frozen layer chooses take {100 * statistics.fmean(regret):.1f} % longer on average than the "
                f"fastest ones, {100 * max(regret):.1f} % at worst ({len(regret)} rows)."
            )
        cells = {shape["name"]: store["rows"].get(shape["name"], {}).get("none", {}).get(t, {}) for shape in shapes}
        gains = [f"{name} {median(c[OURS['frozen']]) / median(c[HALF]):.2f}" for name, c in cells.items() if HALF in c]
        if gains and "context_bytes" not in store:  # the table of blocks has a column of them
            lines[-1] += f" Speedup with weights and context stored in bfloat16: {'; '.join(gains)}."
        for name, sizes in store.get("context_bytes", {}).items():
            if SHARED in cells.get(name, {}):
                text = lambda c: f"{c.split(', ', 1)[1]} {sizes[c] / 1e6:.3g} MB, {time_text(median(cells[name][c]))}"
                lines[-1] += f" Memory of all contexts and time of a call of {name}: {'; '.join(map(text, sizes))}."
    return "\n".join(lines)


def write_readme(store, shapes, marker="speed", columns=OURS):
    readme = ROOT / "src/bench/README.md"
    text = readme.read_text()
    machine, versions = store["machine"], store["versions"]
    peaks = ", ".join(f"{p:.0f} GFLOP/s with {t}" for t, p in sorted(store.get("peaks", {}).items()))
    software = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    note = (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB; peak in float32, measured: {peaks} threads. "
        f"{software}. {store['date']}."
    )
    block = f"{note}\n\n{summary(store, shapes)}\n\n{table(store, shapes, columns)}"
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"bench_report.py: src/bench/README.md has no markers <!-- {marker} --> and <!-- /{marker} -->")
    readme.write_text(pattern.sub(lambda m: m[1] + block + "\n" + m[2], text))


# ---- Plots -------------------------------------------------------------------------------------------------------------------


def new_figure(width, height, **options):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "xattn", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained", **options)


def save(figure, name):
    figure.savefig(BENCH / name, metadata={"Date": None}, facecolor="white")


def plot_ratios(store, shapes, file):
    """The ratio to the fastest peer, row by row, with its spread and the line at 1."""
    threads = sorted(store["peaks"], key=int)
    rows = [s for s in shapes if store["rows"].get(s["name"], {}).get("none")]
    figure, axes = new_figure(11, 1 + 0.2 * len(rows), ncols=len(threads), sharex=True, sharey=True, squeeze=False)
    kinds = [
        ("libtorch, frozen", "frozen", "o", "#1b6ca8"),
        ("libtorch, module", "module", "s", "#888888"),
        ("libtorch, folded", "by hand", "x", "#d1802b"),
    ]
    for axis, t in zip(axes[0], threads):
        for name, text, marker, colour in kinds:
            places, values, errors = [], [], []
            for place, shape in enumerate(rows):
                cell = store["rows"][shape["name"]]["none"].get(t, {})
                peer, ours = fastest_peer(cell), cell.get(name)
                if peer and ours:
                    middle, least, most = ratio(peer[1], ours)
                    places.append(place)
                    values.append(middle)
                    errors.append((middle - least, most - middle))
            bars = [[max(0, e[i]) for e in errors] for i in (0, 1)] if name == kinds[0][0] else None
            axis.errorbar(
                values,
                places,
                xerr=bars,
                fmt=marker,
                markersize=4,
                color=colour,
                label=text,
                elinewidth=1,
                zorder=3 if bars else 2,
            )
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(axis="x", which="major", alpha=0.4)
        axis.set_title(f"{t} thread{'s' * (t != '1')}")
        axis.set_xlabel("times faster than the fastest other runtime")
    axes[0][0].set_yticks(range(len(rows)), [s["name"] for s in rows])
    axes[0][0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0][-1].legend(loc="lower right")
    save(figure, file)


ORDERS = ["standard", "fold_into_query", "fold_into_context"]


def write_crossovers(suffix, files):
    """Adds the files to crossover.json, which is of one machine, and plots it."""
    path = BENCH / f"crossover{suffix}.json"
    store = json.loads(path.read_text()) if path.exists() else {}
    for part in (json.loads(file.read_text()) for file in files):
        if part["machine"] != store.get("machine"):
            store = {"machine": part["machine"], "crossover": {}}
        store["date"] = datetime.date.today().isoformat()
        for t, cells in part["crossover"].items():
            store["crossover"][t] = [cell | {"us": {order: rounded(us) for order, us in cell["us"].items()}} for cell in cells]
    if files:
        cells = {t: "[\n" + ",\n".join(json.dumps(cell) for cell in cells) + "]" for t, cells in store["crossover"].items()}
        rows = ",\n".join(f"{json.dumps(t)}: {text}" for t, text in cells.items())
        head = json.dumps({key: store[key] for key in ("machine", "date")})
        path.write_text(f'{head[:-1]},\n"crossover": {{\n{rows}}}}}\n')
    plot_crossover(store, f"crossover{suffix}.svg")


def plot_crossover(store, file):
    """The fastest order for each pair of lengths: colours are measured, lines show where the planner switches."""
    import numpy
    from matplotlib.colors import ListedColormap

    threads = sorted(store["crossover"], key=int)
    figure, axes = new_figure(5.2 * len(threads), 5, ncols=len(threads), squeeze=False)
    colours = ["#d9d9d9", "#7fb3d5", "#f0b27a"]
    for axis, t in zip(axes[0], threads):
        cells = store["crossover"][t]
        Lq, Lk = (sorted({cell[key] for cell in cells}) for key in ("Lq", "Lk"))
        grids = {key: numpy.zeros((len(Lk), len(Lq))) for key in ("measured", "logits", "values", "lost")}
        for cell in cells:
            at = Lk.index(cell["Lk"]), Lq.index(cell["Lq"])
            best = min(ORDERS, key=lambda order: cell["us"][order])
            grids["measured"][at] = ORDERS.index(best)
            for chain, name in zip(("logits", "values"), cell["chosen"]):
                grids[chain][at] = ORDERS.index("fold_into_query" if name == "prefold" else name)
            grids["lost"][at] = cell["us"]["automatic"] / cell["us"][best] - 1
        axis.imshow(grids["measured"], origin="lower", cmap=ListedColormap(colours), vmin=0, vmax=2, aspect="auto")
        for chain, style in (("logits", "-"), ("values", ":")):
            for y in range(len(Lk)):
                for x in range(len(Lq)):
                    here = grids[chain][y, x]
                    if x + 1 < len(Lq) and grids[chain][y, x + 1] != here:
                        axis.plot([x + 0.5] * 2, [y - 0.5, y + 0.5], "k" + style, linewidth=1.5)
                    if y + 1 < len(Lk) and grids[chain][y + 1, x] != here:
                        axis.plot([x - 0.5, x + 0.5], [y + 0.5] * 2, "k" + style, linewidth=1.5)
        for y, x in zip(*numpy.nonzero(grids["lost"] > 0.1)):
            axis.text(x, y, f"{100 * grids['lost'][y, x]:.0f}", ha="center", va="center", fontsize=6, color="#b03a2e")
        axis.set_xticks(range(len(Lq)), Lq, rotation=90)
        axis.set_yticks(range(len(Lk)), Lk)
        axis.set_xlabel("queries")
        axis.set_ylabel("keys")
        axis.set_title(f"{t} thread{'s' * (t != '1')}; the plan loses {100 * grids['lost'].clip(0).mean():.1f} % on average")
    handles = [axes[0][0].plot([], [], "s", color=c)[0] for c in colours]
    handles += [axes[0][0].plot([], [], "k" + style)[0] for style in ("-", ":")]
    texts = [
        "fastest: standard",
        "fastest: folded into the query",
        "fastest: folded into the context",
        "the plan's border, logits",
        "the plan's border, values",
    ]
    figure.legend(handles, texts, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    save(figure, file)


def plot_maps(store, shapes):
    """The cost of returned attention weights: time with them over time without, for the fastest candidate of each runtime."""
    rows = [s for s in shapes if {"none", "mean", "per-head"} <= store["rows"].get(s["name"], {}).keys()]
    if not rows:
        return
    kinds = [
        ("frozen", lambda n: n == "libtorch, frozen", "#1b6ca8"),
        ("module", lambda n: n == "libtorch, module", "#85c1e9"),
        (
            "PyTorch",
            lambda n: n.split(", ")[0] in ("pytorch", "compile") or n in ("libtorch, eager", "libtorch, sdpa", "libtorch, mha"),
            "#888888",
        ),
        ("ONNX Runtime", lambda n: n.startswith("onnxruntime"), "#d1802b"),
        ("OpenVINO", lambda n: n.startswith("openvino"), "#7d3c98"),
    ]
    figure, axes = new_figure(11, 1.2 + 0.24 * len(rows), ncols=2, sharey=True, sharex=True)
    for axis, weights in zip(axes, ("mean", "per-head")):
        for k, (text, belongs, colour) in enumerate(kinds):
            places, values = [], []
            for place, shape in enumerate(rows):
                times = []
                for kind in ("none", weights):
                    cell = store["rows"][shape["name"]][kind].get("1", {})
                    own = [median(passes) for name, passes in cell.items() if belongs(name)]
                    times.append(min(own, default=None))
                if None not in times:
                    places.append(place + (k - 2) * 0.14)
                    values.append(times[1] / times[0])
            axis.plot(values, places, "o", markersize=4, color=colour, label=text)
        axis.axvline(1, color="black", linewidth=1)
        axis.grid(axis="x", alpha=0.4)
        axis.set_title({"mean": "mean over heads", "per-head": "of each head"}[weights])
        axis.set_xlabel("time with attention weights over time without, 1 thread")
    axes[0].set_yticks(range(len(rows)), [s["name"] for s in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    axes[1].legend()
    save(figure, "maps.svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--avx2", action="store_true")
    parser.add_argument("--crossover", action="store_true")
    arguments = parser.parse_args()
    suffix = "-blocks" if arguments.blocks else "-avx2" if arguments.avx2 else "-cuda" if arguments.device == "cuda" else ""
    if arguments.crossover:
        write_crossovers(suffix, arguments.files)
        return
    path = BENCH / f"results{suffix}.json"
    store = json.loads(path.read_text()) if path.exists() else {}
    shapes = read_blocks() if arguments.blocks else read_shapes()
    order = {shape["name"]: i for i, shape in enumerate(shapes)}
    if arguments.files:
        merge(store, arguments.files)
        store["rows"] = dict(sorted(store["rows"].items(), key=lambda item: order[item[0]]))
        path.write_text(dump(store))
    if arguments.device == "cuda":
        print(table(store, shapes))
        return
    if arguments.blocks:
        write_readme(store, shapes, "blocks", OURS_OF_BLOCKS)
        print(summary(store, shapes))
        return
    write_readme(store, shapes, "avx2" if arguments.avx2 else "speed")
    plot_ratios(store, shapes, f"ratios{suffix}.svg")
    if not arguments.avx2:
        plot_maps(store, shapes)
    print(summary(store, shapes))


if __name__ == "__main__":
    main()
