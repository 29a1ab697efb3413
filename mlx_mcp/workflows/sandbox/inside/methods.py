"""What the interpreter lacks of `re`, `json`, `str`, `datetime`, `functools`, `dataclasses` and `operator`."""


def _groups_named(new):
    r"""`\g<1>` for `\1`, which the interpreter takes for a name where a letter follows."""
    found, rest = "", new
    while "\\" in rest:
        before, _, rest = rest.partition("\\")
        found += before + ("\\g<" + rest[0] + ">" if rest[:1].isdigit() and rest[:1] != "0" else "\\" + rest[:1])
        rest = rest[1:]
    return found + rest


def _re_sub(pattern, new, text, count=0, flags=0):
    import re

    if isinstance(pattern, str):
        pattern = re.compile(pattern, flags)
    if isinstance(new, str):
        return pattern.sub(_groups_named(new), text, count)
    found, end, number = [], 0, 0
    for match in pattern.finditer(text):
        if count and number == count:
            break
        number += 1
        found.append(text[end : match.start()])
        found.append(str(new(match)))
        end = match.end()
    found.append(text[end:])
    return "".join(found)


def _re_subn(pattern, new, text, count=0, flags=0):
    import re

    found = len([1 for _ in re.finditer(pattern, text, flags)])
    return (_re_sub(pattern, new, text, count, flags), min(found, count) if count else found)


def _pattern_sub(pattern, new, text, count=0):
    if type(pattern).__name__ != "Pattern":
        return pattern.sub(new, text)
    return _re_sub(pattern, new, text, count)


def _pattern_subn(pattern, new, text, count=0):
    found = len([1 for _ in pattern.finditer(text)])
    return (_re_sub(pattern, new, text, count), min(found, count) if count else found)


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
    if not isinstance(text, str):
        return text.translate(table)
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
