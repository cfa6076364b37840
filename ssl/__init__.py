"""The standard library's `ssl`, served from here, with this project's subpackages beside it.

`import ssl` from the repository's root finds this folder before the standard module. The standard module's code is run
in this namespace, so that everything that imports `ssl` for TLS gets all of it, and `__path__` stays ours, so that
`ssl.pretrain`, `ssl.methods`... resolve too. Nothing of ours is imported here.
"""

import os as _os
from importlib.machinery import PathFinder as _PathFinder

_stdlib = _PathFinder.find_spec("ssl", [_os.path.dirname(_os.__file__)])
exec(_stdlib.loader.get_code("ssl"), globals())  # pyright: ignore
__file__ = _stdlib.origin  # pyright: ignore  # inspect.getsource reads it
