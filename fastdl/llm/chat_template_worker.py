"""The child process of chat_template.py: one JSON request on stdin, one JSON answer on stdout.

Run as `python -I -S chat_template_worker.py`; imports nothing of fastdl, so that it starts in some 0.1 s. Limits are
set before Jinja sees the template. Answers: {"kind": "ok" | "refused" | "fault" | "missing", "text": ...}.
"""

import contextlib
import json
import sys
from datetime import datetime


class Refused(Exception):
    """The template called raise_exception."""


def set_limits(seconds: int, memory: int) -> None:
    try:
        import resource
    except ImportError:  # not a POSIX system: the parent's time limit remains
        return
    limits = (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    )
    for limit, value in limits:
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # a system without this limit (macOS and RLIMIT_AS)
            resource.setrlimit(limit, (value, value))


def make_environment():
    """The sandbox, with the filters, globals and tags that transformers gives to chat templates."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if tuple(int(part) for part in jinja2.__version__.split(".")[:3] if part.isdigit()) < (3, 1, 6):
        raise ImportError(f"jinja2 {jinja2.__version__} has known ways out of its sandbox")

    class Generation(Extension):
        """{% generation %}..{% endgeneration %} marks the assistant's words for training; here it is only a scope."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class PlainDict:
        """`dict(a=1)` without the class, whose attributes lead further."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    class PlainNamespace(jinja2.utils.Namespace):
        """`namespace(a=1)` that refuses names with a leading underscore."""

        def __init__(*args, **kwargs):
            self, args = args[0], args[1:]
            values = dict(*args, **kwargs)
            for name in values:
                PlainNamespace._check(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            PlainNamespace._check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name):
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise Refused(str(message))

    def strftime_now(pattern):
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=PlainDict(), namespace=PlainNamespace
    )
    return environment


def render(environment, template: str, context: dict, limit: int) -> str:
    pieces, length = [], 0
    for piece in environment.from_string(template).generate(context):
        length += len(piece)
        if length > limit:
            raise OverflowError(f"the template writes more than {limit} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(request: dict) -> tuple[str, str]:
    sys.path += request["path"]
    try:
        environment = make_environment()
        import jinja2
    except ImportError as error:
        return "missing", str(error)
    set_limits(request["seconds"], request["memory"])
    try:
        return "ok", render(environment, request["template"], request["context"], request["output"])
    except Refused as error:
        return "refused", str(error)[:2000]
    except MemoryError:
        return "fault", f"the template needs more than {request['memory'] >> 20} MB"
    except RecursionError:
        return "fault", "the template is nested too deeply"
    except jinja2.TemplateSyntaxError as error:
        return "fault", f"syntax error in line {error.lineno}: {str(error.message)[:500]}"
    except Exception as error:  # whatever a stranger's program raises
        return "fault", f"{type(error).__name__}: {str(error)[:500]}"


def main() -> None:
    kind, text = answer(json.load(sys.stdin.buffer))
    sys.stdout.write(json.dumps({"kind": kind, "text": text}))


if __name__ == "__main__":
    main()
