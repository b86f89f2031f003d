"""Headers that are no JSON, or JSON of a kind that parsers disagree about."""

from __future__ import annotations

import json

from tests.checkpoint.files import U8_PAIR, raw_file
from tests.checkpoint.hostile.cases import Case, header, single

PAIR = json.dumps(U8_PAIR)
BAD = "MalformedError"
MILLION = 10**6


def utf16(text: str) -> bytes:
    return text.encode("utf-16")


GRAMMAR = [
    header("number", "1", "expected '{'", "found '1'", data=b""),
    header("string", '"s"', "expected '{'", "found '\"s\"'", data=b""),
    header("true", "true", "expected '{'", "found 'true'", data=b""),
    header("list of entries", f"[{PAIR}]", "expected '{' at byte 0", "found '["),
    header("white space only", "   \n", "expected '{'", "found the end", data=b""),
    header("trailing comma", f'{{"a":{PAIR},}}', "expected a string", "found '}'"),
    header("leading comma", f'{{,"a":{PAIR}}}', "expected a string", "found ',"),
    header("two commas", f'{{"a":{PAIR},,"b":{PAIR}}}', "expected a string", "found ',"),
    header("no comma", f'{{"a":{PAIR} "b":{PAIR}}}', "expected ',' or '}'", 'found \'"b"'),
    header("no colon", f'{{"a" {PAIR}}}', "expected ':' at byte 5", "found '{"),
    header("comment", f'{{/* */"a":{PAIR}}}', "expected a string", "found '/* */"),
    header("line comment", f'// x\n{{"a":{PAIR}}}', "expected '{' at byte 0", "found '// x"[:8]),
    header("single quotes", "{'a':1}", "expected a string at byte 1", "found"),
    header("bare key", f"{{a:{PAIR}}}", "expected a string at byte 1", "found 'a:"),
    header("key is a number", f"{{1:{PAIR}}}", "expected a string at byte 1", "found '1:"),
    header("key is null", f"{{null:{PAIR}}}", "expected a string at byte 1", "found 'null:"),
    header("NaN for an entry", '{"a":NaN}', "expected '{' at byte 5", "found 'NaN}'", tensor="a"),
    header("not closed", f'{{"a":{PAIR}', "expected ',' or '}'", "found the end"),
    header("closed twice", f'{{"a":{PAIR}}}}}', "expected nothing more", "found '}'"),
    header("closed by the wrong one", f'{{"a":{PAIR}]', "expected ',' or '}'", "found ']'"),
    header("string not closed", '{"a', "expected a string that ends", "found '\"a'"),
    header("escape at the end", '{"a\\', "expected a string that ends", "found"),
    header("NUL after the object", f'{{"a":{PAIR}}}\0', "nothing more", "found '\\x00'"),
    header("text after the object", f'{{"a":{PAIR}}} x', "nothing more", "found 'x'"),
    header("form feed is no space", f'\f{{"a":{PAIR}}}', "expected '{'", "found '\\x0c"),
    header("nor is U+00A0", f'\xa0{{"a":{PAIR}}}', "expected '{'", "found '\\xa0"),
    header("nor is U+2003", f'\u2003{{"a":{PAIR}}}', "expected '{'", "found '\\u2003"),
]
ENCODING = [
    header("byte order mark", b"\xef\xbb\xbf{}", "expected '{'", "found '\\ufeff", data=b""),
    header("utf-16", utf16("{}"), "expected '{'", "found '\\\\xff", data=b""),
    header("utf-32", "{}".encode("utf-32le"), "expected a string", "found '\\x00", data=b""),
    header("overlong encoding", b'{"\xc0\xafetc":1}', "expected UTF-8", "got byte 0xc0 at byte 2"),
    header("lone continuation", b'{"a\x80":1}', "expected UTF-8", "got byte 0x80 at byte 3"),
    header("cut character", b'{"\xe2\x82":1}', "expected UTF-8", "got byte 0xe2 at byte 2"),
    header("surrogates in bytes", b'{"\xed\xa0\x80":1}', "expected UTF-8", "got byte 0xed"),
    header("beyond U+10FFFF", b'{"\xf4\x90\x80\x80":1}', "expected UTF-8", "got byte 0xf4"),
    header("latin-1 in a dtype", b'{"a":{"dtype":"\xe9"}}', "expected UTF-8", "0xe9", tensor="a"),
    header("raw newline in a name", '{"a\nb":1}', "no control character at byte 1", "found '"),
    header("raw tab in a name", '{"a\tb":1}', "no control character at byte 1", "found '"),
    header("raw NUL in a name", '{"a\0b":1}', "no control character at byte 1", "found '"),
    header("escape that is none", '{"\\x41":1}', "expected a string at byte 1", "found Invalid"),
    header("cut escape", '{"\\u12":1}', "expected a string at byte 1", "found Invalid"),
    header("escape with a sign", '{"\\u+123":1}', "expected a string at byte 1", "found Invalid"),
    header("lone high surrogate", '{"\\ud800":1}', "expected UTF-8", "got a lone surrogate"),
    header("lone low surrogate", '{"\\udc00":1}', "expected UTF-8", "got a lone surrogate"),
    header("surrogates reversed", '{"\\udc00\\ud800":1}', "expected UTF-8", "lone surrogate"),
]
SIZE = [
    header("deep lists", '{"a":' + "[" * 200, "expected '{' at byte 5", "found '[[", tensor="a"),
    header(
        "deep objects", '{"a":' * 200, "dtype, shape, data_offsets only", "field 'a'", tensor="a"
    ),
    header("deep metadata", '{"__metadata__":{"a":' + "[" * 200, "expected a string", "found '[["),
    single(
        "30 MB of lists",
        lambda: raw_file(b'{"a":' + b"[" * 30 * MILLION),
        *(BAD, "expected '{' at byte 5", "found '[["),
        tensor="a",
    ),
    single(
        "30 MB of digits",
        lambda: raw_file(b'{"a":{"dtype":"U8","shape":[' + b"9" * 30 * MILLION),
        *(BAD, "expected a list of whole numbers below 65536 bytes", "found '[999"),
        tensor="a",
    ),
    single(
        "30 MB of sizes",
        lambda: raw_file(b'{"a":{"dtype":"U8","shape":[' + b"1," * 15 * MILLION + b"1]"),
        *(BAD, "expected a list of whole numbers below 65536 bytes", "found '[1,1"),
        tensor="a",
    ),
    single(
        "95 MB of name",
        lambda: raw_file(b'{"' + b"x" * 95 * MILLION + b'":1}'),
        *(BAD, "string of at most 8192 bytes at byte 1", "found 95000000"),
    ),
    single(
        "40 MB of name, four bytes a character, with an escape",
        lambda: raw_file(b'{"\\u0000' + "\U0001f600".encode() * (10 * MILLION) + b'":1}'),
        *(BAD, "string of at most 8192 bytes at byte 1", "found 40000006"),
    ),
    single(
        "40 MB of escapes",
        lambda: raw_file(b'{"__metadata__":{"a":"' + b"\\n" * (20 * MILLION) + b'"}}'),
        *(BAD, "string of at most 16777216 bytes", "found 40000000"),
    ),
    single(
        "95 MB of white space",
        lambda: raw_file(b" " * (95 * MILLION) + b"[]"),
        *(BAD, "expected '{' at byte 95000000", "found '[]'"),
    ),
    single(
        "40 MB of metadata keys",
        lambda: raw_file(
            b'{"__metadata__":{' + b",".join(b'"%07d":""' % i for i in range(3_000_000)) + b"}}"
        ),
        *(BAD, "expected at most 16384 keys", "found more at byte"),
    ),
    single(
        "16 MB of metadata, four bytes a character, with an escape, then an error",
        lambda: raw_file(
            b'{"__metadata__":{"a":"\\n' + "\U0001f600".encode() * (4 * MILLION) + b'"},"b":1}'
        ),
        *(BAD, "expected '{'", "found '1}'"),
        tensor="b",
    ),
]
CASES: list[Case] = GRAMMAR + ENCODING + SIZE
