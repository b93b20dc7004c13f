"""In an environment with the wheel: what is imported is the wheel, and it demands what pyproject.toml says.

The packages it needs are lent by another environment, so nothing else would notice a requirement that was lost.
"""

import sys
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

import seguncert
import seguncert.apps
import seguncert.weights

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

for part in (seguncert, seguncert.apps, seguncert.weights):
    if not Path(part.__file__).is_relative_to(sys.prefix):
        sys.exit(f"wheel: expected {part.__name__} in {sys.prefix}. Received: {part.__file__}")

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
asked = {Requirement(line) for line in project["dependencies"]}
for extra, lines in project["optional-dependencies"].items():
    asked |= {Requirement(f'{line}; extra == "{extra}"') for line in lines}
told = {Requirement(line) for line in requires("seguncert") or []}
if told != asked:
    sys.exit(f"wheel: expected the requirements of {sys.argv[1]}. Received others: {sorted(map(str, told ^ asked))}")
