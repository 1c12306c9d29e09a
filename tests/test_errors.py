"""What the command line prints of texts that strangers wrote."""

import shlex
from pathlib import Path

from ddpm.config.overrides import quote_path, typed_value
from ddpm.errors import printable
from ddpm.runtime.console import typed


def test_a_text_for_a_terminal_neither_controls_nor_turns_it() -> None:
    for plain in ("é e\u0301 ٣", "שלום \u200fא", "می\u200cخواهم", "👩\u200d🔬"):
        assert printable(plain) == plain
    assert printable("\x1b[31m\u202eb\udcff\u2028\u2066") == r"\x1b[31m\u202eb\udcff\u2028\u2066"


def test_what_is_to_be_typed_next_names_the_folder() -> None:
    for name in (
        "latest",
        "null",
        "'q'",
        '"',
        "a'b",
        "-m",
        "~",
        "a b",
        "x,y",
        "[x]",
        "שלום",
        "/a/b",
        "runs/1",
    ):
        (argument,) = shlex.split(f"ckpt={typed(Path(name))}")
        value = typed_value([quote_path(argument)], "ckpt")
        assert value not in ("latest", "null") and Path(str(value).replace("\\'", "'")) == Path(name)
