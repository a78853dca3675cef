"""The shell between an engine and the training: passes SIGTERM on, and ends with the training's own exit code.

The first process of a container or a session gets SIGTERM. A plain shell would die of it, or ignore it as process 1, while
Python goes on unwarned; and the exit code that says "run me again" would be the shell's. `wait` returns early with 143 when
a trapped signal comes, whatever the child does, so it is asked again until no signal came meanwhile; bash remembers the
code of a child that ended.

Both scripts take the command as their own words: `bash -c SCRIPT bash tcjax train CONFIG`.
"""

from launch.job import comes_back

RESTART_CODES = tuple(code for code in range(256) if comes_back(code))
FATAL_CODES = tuple(code for code in range(1, 256) if not comes_back(code))

_BEGIN = """\
child= stopped= told=
stop() { stopped=yes told=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true; }
trap stop TERM
"""

_ONCE = """\
"$@" &
child=$!
[ -z "$told" ] || kill -TERM "$child"
wait "$child"; code=$?
while [ -n "$stopped" ]; do stopped=; wait "$child"; code=$?; done
"""

# Once: the engine brings it back (Kubernetes, SkyPilot's managed jobs).
SCRIPT = _BEGIN + _ONCE + 'exit "$code"\n'


def supervised(restarts: int, pause: int = 5) -> str:
    """Again and again, where no engine does it: at most `restarts` times, never after a SIGTERM to the launcher itself."""
    codes = "|".join(map(str, RESTART_CODES[:1])) + "|12[89]|13[1-9]|1[4-9][0-9]|2[0-5][0-9]"
    once = "".join(f"  {line}\n" for line in _ONCE.splitlines())
    return f"""\
{_BEGIN}for again in $(seq 0 {restarts}); do
  [ "$again" = 0 ] || {{ echo "launch: exit code $code, restart $again of {restarts}"; sleep {pause}; }}
  child=
  [ -z "$told" ] || break
{once}  [ -z "$told" ] || break
  case "$code" in {codes}) ;; *) break ;; esac
done
exit "$code"
"""
