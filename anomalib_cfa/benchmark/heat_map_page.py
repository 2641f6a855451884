"""The report's page of heat maps: best and worst cases of each category."""

from collections.abc import Iterable, Sequence

from anomalib_cfa.benchmark.cases import PANELS
from anomalib_cfa.benchmark.folder import Case, Result
from anomalib_cfa.benchmark.labels import label_settings


def heat_map_page(results: Sequence[Result]) -> Iterable[str]:
    """Sections of Markdown: one for each category, with the pictures of each setting's first seed."""
    yield "# Best and worst cases"
    yield (
        f"From left to right: {PANELS}. Best and worst are by how far an image's score lies on the right side of the "
        "threshold, among the defective and among the normal ones: the worst defective one is the likeliest to be "
        "missed, the worst normal one the likeliest false alarm. Colours are scaled alike within a category, and their "
        "middle is the threshold of pixels."
    )
    labels = label_settings([result.spec for result in results])
    first: dict[tuple[str, str], Result] = {}
    for result, label in sorted(zip(results, labels, strict=True), key=lambda pair: pair[0].spec.seed):
        first.setdefault((result.spec.category, label), result)
    category = None
    for (name, label), result in sorted(first.items()):
        if name != category:
            category = name
            yield f"## {category}"
        yield f"### {label}, seed {result.spec.seed}"
        for case in result.cases:
            yield _captioned(case)


def _captioned(case: Case) -> str:
    truth = "defective" if case.is_defective else "normal"
    verdict = "right" if case.margin > 0 else "wrong"
    caption = (
        f"{case.kind.capitalize()} {truth}: `{case.image}`, score {case.score:.3g}, threshold {case.threshold:.3g}"
    )
    return f"{caption}: {verdict} by {abs(case.margin):.2g}\n\n![{case.kind} {truth}, {case.image}]({case.picture})"
