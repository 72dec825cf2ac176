"""Settings of several sections that cannot go together."""

import pytest

from tests.support.configs import composed
from training.config.validate import check_documents


def test_global_vectors_are_not_for_packed_documents():
    for documents in ("split", "stream"):
        check_documents(composed("experiment=bigbird_mlm_etc", f"data.documents={documents}"))
    check_documents(composed("experiment=bigbird_mlm", "data.documents=pack"))
    with pytest.raises(ValueError, match=r"vectors=256; set it to 0, or data\.documents=split"):
        check_documents(composed("experiment=bigbird_mlm_etc", "data.documents=pack"))
