"""What the property tests of readers share: any JSON, a JSON value that is changed, one error."""

import copy
import time

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SETTINGS = settings(
    derandomize=True,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # a folder serves all examples
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=10,
)
SECONDS = 5  # that reading a small file may take on a machine that does much else


def only_user_errors(error_class, read, *arguments):
    """What read(...) gives, None where it raises `error_class`; soon, and with a short message."""
    began = time.monotonic()
    try:
        return read(*arguments)
    except error_class as error:
        assert len(str(error)) < 5000
        return None
    finally:
        assert time.monotonic() - began < SECONDS


def paths_into(value, path=()):
    """The path of every value inside a JSON value, itself included."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_into(inner, (*path, key))


@st.composite
def mutated(draw, value):
    """The JSON value with one of its parts exchanged for another or taken away."""
    value = copy.deepcopy(value)
    path = draw(st.sampled_from(list(paths_into(value))))
    if not path:
        return draw(JSON)
    *outer, last = path
    holder = value
    for key in outer:
        holder = holder[key]
    if draw(st.booleans()):
        holder[last] = draw(JSON)
    else:
        del holder[last]
    return value
