# mypy: ignore-errors
# ruff: noqa: D103, D102, D101, A001, C408, B006, C416, C417, SIM118
"""What programs find in a sandbox, beside the interpreter's own. This text runs there, and is not imported here.

Each definition is put into a sandbox when a program first uses its name (`prelude.py`). `_heapq_nlargest` is what
`heapq.nlargest` stands for in a program (`imports.py`). The interpreter knows neither annotations with meaning, nor
inheritance, nor method decorators, and no host function can be called from within `sorted`, `map` or `max`.
"""


def chunks(text, size, overlap=0):
    """Cut a text or a list into parts of `size`, each of which repeats the last `overlap` of the one before."""
    if size < 1 or not 0 <= overlap < size:
        raise ValueError("chunks(text, size, overlap=0) needs a size of 1 or more, and a smaller overlap")
    found = []
    start = 0
    while start == 0 or start + overlap < len(text):
        found.append(text[start : start + size])
        start += size - overlap
    return found


def grep(pattern, text, ignore_case=False):
    """The lines in which the regular expression is found: (line number, line), counted from 1."""
    import re

    found = re.compile(pattern, re.IGNORECASE) if ignore_case else re.compile(pattern)
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if found.search(line)]


def lines(text, first=1, last=None):
    """The lines of a text from `first` to `last`, counted from 1, both included."""
    return text.splitlines()[first - 1 : last]


def _preview(value):
    if isinstance(value, str):
        shown = repr(value[:60])
        return f"str, {len(value)} characters: {shown}" + ("…" if len(value) > 60 else "")
    if isinstance(value, (bool, int, float)) or value is None:
        return f"{type(value).__name__}: {value}" if not isinstance(value, int) or abs(value) < 10**30 else "int, large"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        kinds = []
        for each in value:
            if len(kinds) == 3:
                break
            kinds.append(_brief(each) + (": " + _brief(value[each]) if isinstance(value, dict) else ""))
        shown = ", ".join(kinds) + (", …" if len(value) > 3 else "")
        return f"{type(value).__name__}, {len(value)} items: {shown}"
    return type(value).__name__


def _brief(value):
    if isinstance(value, str):
        return repr(value[:30]) + ("…" if len(value) > 30 else "")
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, (bool, float)) or value is None or (isinstance(value, int) and abs(value) < 10**30):
        return str(value)
    return type(value).__name__


def _described(found, helpers):
    shown = {}
    for name, value in found.items():
        kind = type(value).__name__
        helper = name in helpers and kind in ("function", "type")
        if not name.startswith("_") and kind != "module" and not helper:
            shown[name] = _preview(value)
    return shown


def _show_vars(found, helpers):
    return "\n".join([f"{name}: {line}" for name, line in _described(found, helpers).items()])


# -- Python's own functions, where the interpreter has none, or cannot call a host function within its own --


def map(function, *values):
    return iter([function(*each) for each in zip(*values)])


def filter(function, values):
    return iter([each for each in values if (each if function is None else function(each))])


def callable(value):
    return type(value).__name__ in ("function", "builtin_function_or_method", "method", "type") or hasattr(
        value, "__call__"
    )


def issubclass(kind, kinds):
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return kind in kinds or object in kinds or (kind is bool and int in kinds)


def ascii(value):
    return "".join([each if ord(each) < 128 else f"\\u{ord(each):04x}" for each in repr(value)])


def exit(code=None):
    raise SystemExit


def quit(code=None):
    raise SystemExit


def _sys_exit(code=None):
    raise SystemExit


class _Text:
    """A file in memory: what `open` gives of `files`, and io.StringIO."""

    def __init__(self, text="", name=None, writing=False):
        self._text = text
        self._at = 0
        self.name = name
        self._writing = writing
        self.closed = False

    def read(self, size=-1):
        end = len(self._text) if size is None or size < 0 else self._at + size
        found = self._text[self._at : end]
        self._at += len(found)
        return found

    def readline(self):
        end = self._text.find("\n", self._at)
        return self.read(-1 if end < 0 else end + 1 - self._at)

    def readlines(self):
        return self.read().splitlines(True)

    def write(self, text):
        self._text += text
        self._at = len(self._text)
        return len(text)

    def writelines(self, texts):
        for each in texts:
            self.write(each)

    def getvalue(self):
        return self._text

    def seek(self, at, whence=0):
        self._at = at if whence == 0 else len(self._text)
        return self._at

    def tell(self):
        return self._at

    def close(self):
        if self._writing and not self.closed:
            files[self.name] = self._text  # noqa: F821
        self.closed = True

    def flush(self):
        pass

    def __iter__(self):
        return iter(self.readlines())

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
        return False


def open(name, mode="r", *options, **more):
    """One of `files`; a new one is kept there when it is closed."""
    name = str(name)
    if "w" in mode or "a" in mode:
        return _Text(files.get(name, "") if "a" in mode else "", name, True)  # noqa: F821
    found = [each for each in files if each == name or each.endswith("/" + name)]  # noqa: F821
    if len(found) != 1:
        raise FileNotFoundError(f"{name} is not one of `files`: {sorted(files)[:8]}")  # noqa: F821
    return _Text(files[found[0]], name)  # noqa: F821


def _io_StringIO(text=""):
    return _Text(text)


# -- many calls at once --


class _Future:
    def __init__(self, pool, function, args, kwargs):
        self._pool, self._call = pool, (function, args, kwargs)
        self._done, self._value, self._error = False, None, None

    def _run(self):
        function, args, kwargs = self._call
        try:
            self._value = function(*args, **kwargs)
        except Exception as error:
            self._error = error
        self._done = True

    def result(self, timeout=None):
        if not self._done:
            self._pool._run()
        if self._error is not None:
            raise self._error
        return self._value

    def exception(self, timeout=None):
        if not self._done:
            self._pool._run()
        return self._error

    def done(self):
        return self._done

    def cancel(self):
        return False


class _concurrent_futures_ThreadPoolExecutor:
    """Calls of `llm_query` that were submitted go out as one batch, when the first result is asked for."""

    def __init__(self, *options, **more):
        self._waiting = []

    def submit(self, function, *args, **kwargs):
        future = _Future(self, function, args, kwargs)
        self._waiting.append(future)
        return future

    def map(self, function, *values, **options):
        futures = [self.submit(function, *each) for each in zip(*values)]
        return iter([each.result() for each in futures])

    def _run(self):
        waiting = self._waiting
        self._waiting = []
        batches = []
        for each in waiting:
            function, args, kwargs = each._call
            if len(args) == 1 and _is_llm_query(function):
                if not batches or batches[-1][0] != kwargs:
                    batches.append((kwargs, []))
                batches[-1][1].append(each)
            else:
                each._run()
        for kwargs, futures in batches:
            answers = llm_query_batched([each._call[1][0] for each in futures], **kwargs)  # noqa: F821
            for future, answer in zip(futures, answers):
                future._value, future._done = answer, True

    def shutdown(self, *options, **more):
        self._run()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._run()
        return False


def _is_llm_query(function):
    try:
        return function is llm_query  # noqa: F821
    except NameError:
        return False


def _concurrent_futures_ProcessPoolExecutor(*options, **more):
    return _concurrent_futures_ThreadPoolExecutor()


def _concurrent_futures_as_completed(futures, timeout=None):
    for each in futures:
        each.exception()
    return iter(list(futures))


def _concurrent_futures_wait(futures, timeout=None, return_when=None):
    for each in futures:
        each.exception()
    return (set(futures), set())


ThreadPoolExecutor = _concurrent_futures_ThreadPoolExecutor
as_completed = _concurrent_futures_as_completed
StringIO = _Text
OrderedDict = dict


def _is_callable(value):
    return type(value).__name__ in ("function", "builtin_function_or_method", "method")


def _re_sub(pattern, new, text, count=0, flags=0):
    import re

    if not _is_callable(new):
        return re.sub(pattern, new, text, count=count, flags=flags)
    if isinstance(pattern, str):
        pattern = re.compile(pattern, flags)
    found, end = [], 0
    for number, match in enumerate(pattern.finditer(text)):
        if count and number == count:
            break
        found.append(text[end : match.start()])
        found.append(str(new(match)))
        end = match.end()
    found.append(text[end:])
    return "".join(found)


def _re_subn(pattern, new, text, count=0, flags=0):
    import re

    found = len(re.findall(pattern, text, flags))
    return (_re_sub(pattern, new, text, count, flags), min(found, count) if count else found)


def _pattern_sub(pattern, new, text, count=0):
    return _re_sub(pattern, new, text, count) if _is_callable(new) else pattern.sub(new, text, count)


def _json_plain(value, default):
    if isinstance(value, dict):
        return {key: _json_plain(each, default) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_plain(each, default) for each in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _json_plain(default(value), default)


def _json_dumps_default(value, default=None, **options):
    import json

    return json.dumps(_json_plain(value, default), **options)


def _str_maketrans(old, new=None, removed=""):
    if new is None:
        return {ord(key) if isinstance(key, str) else key: each for key, each in old.items()}
    table = {ord(each): new[index] for index, each in enumerate(old)}
    table.update({ord(each): None for each in removed})
    return table


def _translate(text, table):
    found = [table.get(ord(each), each) for each in text]
    return "".join([chr(each) if isinstance(each, int) else each for each in found if each is not None])


def _isocalendar(day):
    import datetime

    date = datetime.date(day.year, day.month, day.day)
    thursday = date + datetime.timedelta(days=3 - date.weekday())
    first = datetime.date(thursday.year, 1, 1)
    return (thursday.year, (thursday - first).days // 7 + 1, date.weekday() + 1)


def _fromtimestamp(kind, seconds, tz=None):
    import datetime

    moment = datetime.datetime(1970, 1, 1, tzinfo=tz) + datetime.timedelta(seconds=seconds)
    return moment.date() if kind is datetime.date else moment


# -- classes --


def _member(value, name):
    """An attribute, which may be a property, a static method or a class method."""
    kind = value if type(value).__name__ == "type" else type(value)
    known = getattr(kind, "_kinds", {}).get(name)
    if known is None:
        return getattr(value, name)
    found = getattr(kind, name)
    if known == "static":
        return found
    if known == "class":
        return lambda *args, **kwargs: found(kind, *args, **kwargs)
    return found if kind is value else found(value)


def _flat(kinds):
    return [each for kind in kinds for each in _flat(kind)] if isinstance(kinds, tuple) else [kinds]


def _isinstance(value, kinds):
    if isinstance(value, kinds):
        return True
    lineage = getattr(type(value), "_lineage", ())
    error = getattr(type(value), "_error", None)
    for each in _flat(kinds):
        if each in lineage or (error is not None and _builtin_subclass(error, each)):
            return True
    return False


def _builtin_subclass(error, kind):
    """Whether a built-in exception is of a kind, as far as exceptions of one's own come from it."""
    if error is kind or kind is BaseException or (kind is Exception and error is not BaseException):
        return True
    above = {
        KeyError: LookupError,
        IndexError: LookupError,
        FileNotFoundError: OSError,
        PermissionError: OSError,
        TimeoutError: OSError,
        NotImplementedError: RuntimeError,
        ZeroDivisionError: ArithmeticError,
        OverflowError: ArithmeticError,
    }
    return above.get(error) is kind


def _issubclass(kind, kinds):
    lineage = getattr(kind, "_lineage", ())
    return any([each is kind or each in lineage for each in _flat(kinds)])


def _len(value):
    return value.__len__() if hasattr(type(value), "__len__") else len(value)


def _initialized(value, *args):
    if hasattr(type(value), "_error"):
        value.args = args


def _said(value):
    args = getattr(value, "args", ())
    return str(args[0]) if len(args) == 1 else str(args) if args else ""


_errors = []


def _raised(value):
    """What is raised: a built-in exception as it is; for an object of an exception class, what stands for it."""
    if type(value).__name__ == "type" and hasattr(value, "_error"):
        value = value()
    if not hasattr(type(value), "_error"):
        return value
    if not hasattr(value, "args"):
        value.args = ()
    stands = type(value)._error(f"\x1e{type(value).__name__}\x1e{value}")
    _errors.append((stands, value))
    while len(_errors) > 100:
        _errors.pop(0)
    return stands


def _said_by(error):
    """The object that a raised exception stands for, or the exception."""
    for stands, value in _errors:
        if stands is error:
            return value
    return error


def _is_caught(error, kinds):
    value = _said_by(error)
    for each in _flat(kinds):
        if hasattr(each, "_error"):
            if type(value) is each or each in getattr(type(value), "_lineage", ()):
                return True
        elif isinstance(error, each):
            return True
    return False


class _EnumMember:
    def __init__(self, kind, name, value, plain):
        self._kind, self.name, self.value, self._plain = kind, name, value, plain

    def __repr__(self):
        return f"<{self._kind}.{self.name}: {self.value!r}>"

    def __str__(self):
        return str(self.value) if self._plain else f"{self._kind}.{self.name}"

    def __eq__(self, other):
        if self is other:
            return True
        return self._plain and (other.value if isinstance(other, _EnumMember) else other) == self.value

    def __hash__(self):
        return hash(self.value) if self._plain else hash(self.name)


class _Enumeration:
    """What stands for a class that is an enumeration."""

    def __init__(self, name, values, plain):
        self.__name__ = name
        self._members = []
        for each, value in values.items():
            member = _EnumMember(name, each, value, plain)
            self._members.append(member)
            setattr(self, each, member)
        self.__members__ = {each.name: each for each in self._members}

    def __iter__(self):
        return iter(self._members)

    def __len__(self):
        return len(self._members)

    def __contains__(self, value):
        return any([each is value or each.value == value for each in self._members])

    def __getitem__(self, name):
        return self.__members__[name]

    def __call__(self, value):
        for each in self._members:
            if each.value == value or each is value:
                return each
        raise ValueError(f"{value!r} is not a valid {self.__name__}")


# -- modules --


def _functools_wraps(function):
    return lambda wrapper: wrapper


def _functools_cmp_to_key(compare):
    raise NotImplementedError("functools.cmp_to_key: give `key` a function that returns a tuple to sort by")


def _attributes_of(value):
    return {name: getattr(value, name) for name in type(value)._attributes if hasattr(value, name)}


def _dataclasses_asdict(value):
    if isinstance(value, (list, tuple)):
        return [_dataclasses_asdict(each) for each in value]
    if isinstance(value, dict):
        return {key: _dataclasses_asdict(each) for key, each in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {name: _dataclasses_asdict(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def _dataclasses_astuple(value):
    return tuple([getattr(value, name) for name in value.__dataclass_fields__])


def _dataclasses_replace(value, **changes):
    given = {name: getattr(value, name) for name in value.__dataclass_fields__}
    given.update(changes)
    return type(value)(**given)


def _dataclasses_fields(value):
    return tuple(value.__dataclass_fields__.values())


def _operator_itemgetter(*keys):
    return lambda value: value[keys[0]] if len(keys) == 1 else tuple([value[key] for key in keys])


def _operator_attrgetter(*names):
    return lambda value: getattr(value, names[0]) if len(names) == 1 else tuple([getattr(value, n) for n in names])


def _operator_methodcaller(name, *args, **kwargs):
    return lambda value: getattr(value, name)(*args, **kwargs)


def _operator_add(one, other):
    return one + other


def _operator_sub(one, other):
    return one - other


def _operator_mul(one, other):
    return one * other


def _operator_truediv(one, other):
    return one / other


def _operator_and_(one, other):
    return one & other


def _operator_or_(one, other):
    return one | other


def _operator_contains(one, other):
    return other in one


def _operator_lt(one, other):
    return one < other


def _operator_gt(one, other):
    return one > other


def _operator_eq(one, other):
    return one == other


def _statistics_values(values):
    values = list(values)
    if not values:
        raise ValueError("statistics needs at least one value")
    return values


def _statistics_mean(values):
    import math

    values = _statistics_values(values)
    return math.fsum(values) / len(values) if isinstance(sum(values), float) else _exact(sum(values), len(values))


def _exact(one, other):
    return one // other if one % other == 0 else one / other


def _statistics_fmean(values):
    import math

    values = _statistics_values(values)
    return math.fsum(values) / len(values)


def _statistics_median(values):
    values = sorted(_statistics_values(values))
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def _statistics_median_low(values):
    values = sorted(_statistics_values(values))
    return values[(len(values) - 1) // 2]


def _statistics_median_high(values):
    values = sorted(_statistics_values(values))
    return values[len(values) // 2]


def _statistics_multimode(values):
    counts = {}
    for each in values:
        counts[each] = counts.get(each, 0) + 1
    most = max(counts.values(), default=0)
    return [each for each, count in counts.items() if count == most]


def _statistics_mode(values):
    return _statistics_multimode(_statistics_values(values))[0]


def _statistics_pvariance(values, mu=None):
    import math

    values = _statistics_values(values)
    mean = _statistics_fmean(values) if mu is None else mu
    return math.fsum([(each - mean) ** 2 for each in values]) / len(values)


def _statistics_variance(values, xbar=None):
    values = list(values)
    if len(values) < 2:
        raise ValueError("statistics.variance needs at least two values")
    return _statistics_pvariance(values, xbar) * len(values) / (len(values) - 1)


def _statistics_stdev(values, xbar=None):
    return _statistics_variance(values, xbar) ** 0.5


def _statistics_pstdev(values, mu=None):
    return _statistics_pvariance(values, mu) ** 0.5


def _statistics_quantiles(values, n=4, method="exclusive"):
    values = sorted(values)
    found = []
    count = len(values) + 1 if method == "exclusive" else len(values) - 1
    for part in range(1, n):
        at, rest = part * count // n, part * count % n
        if method == "exclusive":
            at = min(max(at, 1), len(values) - 1)
            rest = part * count - at * n
            found.append((values[at - 1] * (n - rest) + values[at] * rest) / n)
        else:
            found.append((values[at] * (n - rest) + values[min(at + 1, len(values) - 1)] * rest) / n)
    return found


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


def _heapq_heappush(heap, value):
    heap.append(value)
    at = len(heap) - 1
    while at and heap[at] < heap[(at - 1) // 2]:
        above = (at - 1) // 2
        heap[at], heap[above] = heap[above], heap[at]
        at = above


def _heapq_sink(heap, at):
    while True:
        least = at
        for below in (2 * at + 1, 2 * at + 2):
            if below < len(heap) and heap[below] < heap[least]:
                least = below
        if least == at:
            return
        heap[at], heap[least] = heap[least], heap[at]
        at = least


def _heapq_heappop(heap):
    last = heap.pop()
    if not heap:
        return last
    first, heap[0] = heap[0], last
    _heapq_sink(heap, 0)
    return first


def _heapq_heapify(heap):
    for at in range(len(heap) // 2 - 1, -1, -1):
        _heapq_sink(heap, at)


def _heapq_heappushpop(heap, value):
    if heap and heap[0] < value:
        value, heap[0] = heap[0], value
        _heapq_sink(heap, 0)
    return value


def _heapq_heapreplace(heap, value):
    first, heap[0] = heap[0], value
    _heapq_sink(heap, 0)
    return first


def _heapq_nlargest(count, values, key=None):
    return sorted(values, key=key, reverse=True)[: max(count, 0)]


def _heapq_nsmallest(count, values, key=None):
    return sorted(values, key=key)[: max(count, 0)]


def _heapq_merge(*values, key=None, reverse=False):
    return iter(sorted([each for part in values for each in part], key=key, reverse=reverse))


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


def _pprint_pformat(value, indent=1, width=80, **options):
    import json

    try:
        return json.dumps(value, indent=2, ensure_ascii=False)
    except TypeError:
        return repr(value)


def _pprint_pprint(value, *options, **more):
    print(_pprint_pformat(value))


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
