"""What names on the command line stand for."""

import pytest

from ssl_kit.core.errors import UserError
from ssl_kit.core.named import expanded


def test_patterns_stand_for_their_files_in_order():
    assert expanded("one.tar") == ["one.tar"]
    assert expanded("a{08..10}-{1..2}.tar") == [f"a{n}-{m}.tar" for n in ("08", "09", "10") for m in (1, 2)]
    assert expanded("{0..0}" * 3_000) == ["0" * 3_000]


@pytest.mark.parametrize(
    ("name", "count"), [("a{3..1}", "0"), ("{3..1}{3..1}", "0"), ("{0..99999}{0..9}", "1,000,000")]
)
def test_patterns_for_none_or_far_too_many_are_refused(name, count):
    with pytest.raises(UserError, match=f"stands for {count} files; wanted 1 to 100,000"):
        expanded(name)
