"""`statistics` and `heapq`."""


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
