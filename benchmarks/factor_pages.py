"""Parts of docs/results.md about factorization: in plans, of tables, at run time, and its own speed."""

from __future__ import annotations

from size_pages import Results, Table, source_of


def families(results: Results, table: Table) -> str:
    """Plans of all families against the best without factorization."""
    rows = []
    for row in results["rows"]:
        won = f"{row['factorized_sites']} of {row['sites']}" + (
            f" ({', '.join(row['factorized_methods'])}), {row['factorized_bytes'] / row['bytes']:.0%} of the bytes"
            if row["factorized_sites"]
            else _behind(row["unused"].get("factorize"))
        )
        rows.append(
            [
                row["model"], f"{row['ratio']}", f"{row['bytes']:,}", f"{row['without_bytes']:,}", f"{row['quality']:.3g}",
                f"{row['without_quality']:.3g}", f"{row['quality'] / row['without_quality']:.2f}", won,
            ]
        )  # fmt: skip
    head = ["model", "ratio", "bytes", "without", "quality", "without", "share", "sites that factorization won"]
    return f"""## What factorization adds

Octavo chose one plan among all families (preset `best`). It chose another by the same steps and from the same curves, without the methods of the family
`factorize`. Quality is 1 − cosine for the encoder and KL for language models; lower is better. It is measured on texts that were used neither for
calibration nor for the choice of the plan.

{table(head, rows)}

{source_of(results)}"""


def _behind(found: dict | None) -> str:
    """Why it won none."""
    if not found or not found["times"]:
        return ": nothing as small"
    return f": it would lose {found['times'][0]:.2f} times as much at its nearest site, {found['times'][1]:.2f} at the median one"


def embedding(results: Results, table: Table) -> str:
    """One table of tokens, at five sizes."""
    points: dict[int, dict[str, dict]] = {}
    for point in results["points"]:
        points.setdefault(point["asked"], {})[point["method"]] = point
    names = list(dict.fromkeys(point["method"] for point in results["points"]))
    cell = lambda point: f"{point['quality']:.3g} ({point['bytes'] / 1e6:.2f} MB)"  # noqa: E731
    rows = [[f"{asked}", *(cell(found[name]) for name in names)] for asked, found in sorted(points.items())]
    return f"""## A table of tokens

Only MiniLM's table of {results["rows"]:,} × {results["columns"]} is compressed, in equal bytes. The measure is 1 − cosine of sentence vectors of the whole model, on
{results["test_sentences"]} sentences of the Brown corpus. The evidence comes from {results["calibration_sentences"]} others. `entropy` is quantization alone.
`activation-svd` is one weighted SVD of the whole table with quantized factors. `groupreduce` has blocks by frequency, quantized in the same way.

{table(["times smaller", *(f"`{name}`" for name in names)], rows)}

{source_of(results)}"""


def factorized(results: Results, table: Table) -> str:
    """Latency of factors beside dense."""
    rows = [
        [
            row["model"], f"{row['ratio']:.2f}", f"{row['bytes']:,}", f"{row['source']:.2f} → {row['artifact']:.2f}", f"{timed['batch']}",
            f"{timed['seconds']['dense'] * 1e3:.2f} ms", f"{timed['seconds']['factors'] * 1e3:.2f} ms", f"{timed['speedup']:.2f}",
            timed["verdict"], f"{timed['as factors']} of {timed['factored']}",
        ]
        for row in results["rows"]
        for timed in row["latency"]
    ]  # fmt: skip
    head = ["model", "ratio", "bytes", "quality", "batch", "dense", "loaded", "speed-up", "verdict", "sites as factors"]
    return f"""## Running as factors

These artifacts contain only quantized factors (`methods=["factorize"]`), and are loaded with `factors=True`. A site runs as float32 factors if that was
measured to be faster while loading; otherwise it runs dense. Quality is test accuracy or area under the curve, in percent. Dense and loaded models run in turns, and the
least time of many turns is taken. This is repeated five times. The speed-up is the median; the verdict is given only if all five agree.

{table(head, rows)}

{source_of(results)}"""


def factor_speed(results: Results, table: Table) -> str:
    """How long decompositions take."""
    curves, (rows, columns) = results["curves"], results["table"]
    lines = [
        [
            f"{chain['cores']} cores, bond {chain['chi']}, {chain['share']:.0%} of the coefficients", f"{chain['seconds']:.1f} s",
        ]
        for chain in results["chains"]
    ]  # fmt: skip
    whole = f"whitened SVD of MiniLM's {curves['layers']} linear layers, losses of all {curves['points']:,} ranks"
    lines.insert(0, [whole, f"{curves['seconds']:.1f} s"])
    return f"""## Speed of factorization

{table([f"what (the chains are of the table, {rows:,} × {columns})", "time"], lines)}

{source_of(results)}"""


PARTS = {"families": families, "embedding": embedding, "factorized": factorized, "factor-speed": factor_speed}
