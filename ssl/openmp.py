"""Let OpenMP's idle threads sleep instead of spin. Imported before torch, which reads the setting once.

Between two parallel regions GNU OpenMP's threads spin by default, and take the cores from the decoding threads and from
whatever else runs. With another busy process on 2 cores a step took up to twenty times as long; alone, sleeping cost
nothing that could be measured. OMP_WAIT_POLICY in the environment overrides it.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
