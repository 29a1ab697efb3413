"""Pools of threads, whose calls of the model go out as one batch."""


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
            answers = llm_query_batched([each._call[1][0] for each in futures], **kwargs)
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
        return function is llm_query
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
