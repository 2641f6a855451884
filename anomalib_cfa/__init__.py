"""CFA, coupled-hypersphere-based feature adaptation (arXiv 2206.04325), as an anomalib model."""

import anomalib_cfa_hook
from anomalib_cfa.compatibility import check_versions

check_versions()
anomalib_cfa_hook.install()

# First: it asks the hook for `Cfa`, which imports `lightning_model` once anomalib's base class is there. The other way
# round, `lightning_model` would import `anomalib.models`, which would ask for a `Cfa` that is not defined yet.
import anomalib.models  # noqa: E402, F401

from anomalib_cfa.lightning_model import Cfa  # noqa: E402

anomalib_cfa_hook.explain_if_not_registered()

__version__ = "0.2.0"
__all__ = ["Cfa", "__version__"]
