"""`string`, `textwrap`, `html`, `urllib.parse`, `difflib`, and what else of modules is short."""

_string_ascii_lowercase = "abcdefghijklmnopqrstuvwxyz"
_string_ascii_uppercase = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_string_ascii_letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_string_digits = "0123456789"
_string_hexdigits = "0123456789abcdefABCDEF"
_string_punctuation = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_string_whitespace = " \t\n\r\x0b\x0c"
_string_printable = _string_digits + _string_ascii_letters + _string_punctuation + _string_whitespace


def _string_capwords(text, sep=None):
    return (sep or " ").join([each.capitalize() for each in text.split(sep)])


class _string_Template:
    def __init__(self, template):
        self.template = template

    def substitute(self, *given, **more):
        return self._filled(dict(given[0] if given else {}, **more), True)

    def safe_substitute(self, *given, **more):
        return self._filled(dict(given[0] if given else {}, **more), False)

    def _filled(self, values, strict):
        def filled(match):
            name = match.group(1) or match.group(2)
            if name is None:
                return "$"
            if name not in values and not strict:
                return match.group(0)
            return str(values[name])

        return _re_sub(r"\$(?:\$|(\w+)|\{(\w+)\})", filled, self.template)


def _textwrap_dedent(text):
    rows = [each if each.strip() else "" for each in text.split("\n")]
    margins = [len(each) - len(each.lstrip()) for each in rows if each]
    margin = min(margins, default=0)
    return "\n".join([each[margin:] for each in rows])


def _textwrap_indent(text, prefix, predicate=None):
    kept = predicate or (lambda row: row.strip())
    return "".join([prefix + each if kept(each) else each for each in text.splitlines(True)])


def _textwrap_wrap(text, width=70, initial_indent="", subsequent_indent="", **options):
    rows, row = [], initial_indent
    empty = True
    for word in text.split():
        while len(word) > width - len(row) and empty and len(word) > width - len(subsequent_indent):
            cut = max(width - len(row), 1)
            rows.append(row + word[:cut])
            row, word = subsequent_indent, word[cut:]
        if not empty and len(row) + 1 + len(word) > width:
            rows.append(row)
            row, empty = subsequent_indent, True
        row, empty = row + ("" if empty else " ") + word, False
    if not empty:
        rows.append(row)
    return rows


def _textwrap_fill(text, width=70, **options):
    return "\n".join(_textwrap_wrap(text, width, **options))


def _textwrap_shorten(text, width, placeholder=" [...]", **options):
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    words, kept = text.split(), ""
    for word in words:
        longer = (kept + " " + word).strip()
        if len(longer) + len(placeholder) > width:
            break
        kept = longer
    return kept + placeholder if kept else placeholder.strip()


def _collections_OrderedDict(*given, **more):
    return dict(*given, **more)


def _collections_ChainMap(*maps):
    found = {}
    for each in reversed(maps):
        found.update(each)
    return found


def _html_escape(text, quote=True):
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace('"', "&quot;").replace("'", "&#x27;") if quote else text


def _html_unescape(text):
    for old, new in (
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", '"'),
        ("&#x27;", "'"),
        ("&#39;", "'"),
        ("&nbsp;", "\xa0"),
    ):
        text = text.replace(old, new)
    return text.replace("&amp;", "&")


def _pprint_line(value, sort):
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: str(item[0])) if sort else value.items()
        return "{" + ", ".join([f"{key!r}: {_pprint_line(each, sort)}" for key, each in items]) + "}"
    if isinstance(value, list):
        return "[" + ", ".join([_pprint_line(each, sort) for each in value]) + "]"
    return repr(value)


def _pprint_pformat(value, indent=1, width=80, depth=None, compact=False, sort_dicts=True, before=0):
    line = _pprint_line(value, sort_dicts)
    if before + len(line) <= width or not value or not isinstance(value, (dict, list, tuple)):
        return line
    rows = []
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: str(item[0])) if sort_dicts else value.items()
        for key, each in items:
            name = f"{key!r}: "
            rows.append(name + _pprint_pformat(each, 1, width, None, False, sort_dicts, before + 1 + len(name)))
    else:
        rows = [_pprint_pformat(each, 1, width, None, False, sort_dicts, before + 1) for each in value]
    start, end = ("{", "}") if isinstance(value, dict) else ("[", "]") if isinstance(value, list) else ("(", ")")
    return start + (",\n" + " " * (before + 1)).join(rows) + end


def _pprint_pprint(value, *options, **more):
    print(_pprint_pformat(value, **more))


def _calendar_isleap(year):
    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)


def _calendar_monthrange(year, month):
    import datetime

    days = [31, 29 if _calendar_isleap(year) else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    return (datetime.date(year, month, 1).weekday(), days[month - 1])


_calendar_month_name = [
    "",
    *"January February March April May June July August September October November December".split(),
]
_calendar_month_abbr = ["", *"Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()]
_calendar_day_name = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_calendar_day_abbr = "Mon Tue Wed Thu Fri Sat Sun".split()
_logging_DEBUG = 10
_logging_INFO = 20
_logging_WARNING = 30
_logging_ERROR = 40
_logging_CRITICAL = 50


class _Logger:
    def __init__(self):
        self.level = 30

    def _log(self, level, name, message, args):
        if level >= self.level:
            print(f"{name}: " + (str(message) % args if args else str(message)))

    def setLevel(self, level):
        self.level = level

    def debug(self, message, *args, **more):
        self._log(10, "DEBUG", message, args)

    def info(self, message, *args, **more):
        self._log(20, "INFO", message, args)

    def warning(self, message, *args, **more):
        self._log(30, "WARNING", message, args)

    def error(self, message, *args, **more):
        self._log(40, "ERROR", message, args)

    def exception(self, message, *args, **more):
        self._log(40, "ERROR", message, args)


_logger = _Logger()


def _logging_getLogger(name=None):
    return _logger


def _logging_basicConfig(level=30, **options):
    _logger.setLevel(level)


def _logging_debug(message, *args, **more):
    _logger.debug(message, *args)


def _logging_info(message, *args, **more):
    _logger.info(message, *args)


def _logging_warning(message, *args, **more):
    _logger.warning(message, *args)


def _logging_error(message, *args, **more):
    _logger.error(message, *args)


def _urllib_parse_quote(text, safe="/"):
    kept = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-~" + safe
    return "".join([chr(each) if chr(each) in kept and each < 128 else f"%{each:02X}" for each in text.encode()])


def _urllib_parse_unquote(text):
    import re

    return _re_sub(r"(?:%[0-9A-Fa-f]{2})+", lambda m: bytes.fromhex(m.group(0).replace("%", "")).decode(), text)


class _UrlParts:
    def __init__(self, scheme, netloc, path, query, fragment):
        self.scheme, self.netloc, self.path, self.query, self.fragment = scheme, netloc, path, query, fragment
        host = netloc.rpartition("@")[2]
        self.hostname = host.partition(":")[0].lower() or None
        self.port = int(host.partition(":")[2]) if ":" in host else None
        self.params = ""


def _urllib_parse_urlparse(url):
    rest, _, fragment = url.partition("#")
    rest, _, query = rest.partition("?")
    scheme, colon, after = rest.partition("://")
    if not colon:
        return _UrlParts("", "", rest, query, fragment)
    netloc, slash, path = after.partition("/")
    return _UrlParts(scheme.lower(), netloc, slash + path, query, fragment)


def _urllib_parse_urlsplit(url):
    return _urllib_parse_urlparse(url)


def _urllib_parse_parse_qs(query):
    found = {}
    for each in query.split("&"):
        key, _, value = each.partition("=")
        if value:
            found.setdefault(_urllib_parse_unquote(key.replace("+", " ")), []).append(
                _urllib_parse_unquote(value.replace("+", " "))
            )
    return found


class _difflib_SequenceMatcher:
    def __init__(self, isjunk=None, a="", b="", autojunk=True):
        self.a, self.b = a, b

    def ratio(self):
        total = len(self.a) + len(self.b)
        return 2.0 * self._matches(0, len(self.a), 0, len(self.b)) / total if total else 1.0

    def quick_ratio(self):
        return self.ratio()

    def _matches(self, a_from, a_to, b_from, b_to):
        waiting, total = [(a_from, a_to, b_from, b_to)], 0
        while waiting:
            a_from, a_to, b_from, b_to = waiting.pop()
            a_at, b_at, size = self._longest(a_from, a_to, b_from, b_to)
            if size:
                total += size
                waiting.append((a_from, a_at, b_from, b_at))
                waiting.append((a_at + size, a_to, b_at + size, b_to))
        return total

    def _longest(self, a_from, a_to, b_from, b_to):
        best = (a_from, b_from, 0)
        lengths = {}
        places = {}
        for j in range(b_from, b_to):
            places.setdefault(self.b[j], []).append(j)
        for i in range(a_from, a_to):
            new = {}
            for j in places.get(self.a[i], []):
                size = new[j] = lengths.get(j - 1, 0) + 1
                if size > best[2]:
                    best = (i - size + 1, j - size + 1, size)
            lengths = new
        return best


def _difflib_get_close_matches(word, possibilities, n=3, cutoff=0.6):
    scored = []
    for each in possibilities:
        ratio = _difflib_SequenceMatcher(None, each, word).ratio()
        if ratio >= cutoff:
            scored.append((ratio, each))
    return [each for _, each in sorted(scored, reverse=True)[:n]]


def _uuid_uuid4():
    import random

    digits = "".join([random.choice("0123456789abcdef") for _ in range(32)])
    digits = digits[:12] + "4" + digits[13:16] + random.choice("89ab") + digits[17:]
    return "-".join([digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]])


class _threading_Lock:
    def acquire(self, *options, **more):
        return True

    def release(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False


def _traceback_format_exc():
    return "the traceback is not known in a sandbox: print the exception itself"


def _traceback_print_exc():
    print(_traceback_format_exc())
