"""Names and other text of the user's as they may be shown: no control character and no escape sequence gets through."""

import re

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: object, keep: str = "") -> str:
    """`text` with everything that would move the cursor, colour, reorder or not print written as an escape.

    What a file system gives out for a byte that is not UTF-8 becomes \\xNN. Characters in `keep` stay.
    """

    def escaped(found: re.Match[str]) -> str:
        letter = found[0]
        if letter in keep:
            return letter
        if "\udc80" <= letter <= "\udcff":
            return f"\\x{ord(letter) - 0xDC00:02x}"
        return letter.encode("unicode_escape", "surrogatepass").decode()

    return _UNSAFE.sub(escaped, str(text))
