"""Environments of ``conf/``: which folders ``--env`` reads, in which order.

Kedro reads two, ``conf/base`` and the one of ``--env``. Here a data set has variants, and what is
this machine's own holds for all of them.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from kedro.config import MissingConfigException, OmegaConfigLoader
from kedro.framework.context import KedroContext

from rdd_pipeline.errors import UserError

LOCAL = "local"
"""Folder with the settings of this machine; git ignores what is in it."""


class LayeredConfigLoader(OmegaConfigLoader):
    """``--env=DATASET/VARIANT`` reads ``base``, ``DATASET``, ``DATASET/VARIANT`` and ``local``.

    Each changes the keys that it names. Files are looked for in these folders themselves, since a
    folder below is another environment.
    """

    @property
    def parents(self) -> list[str]:
        """Environments that the chosen one is a variant of, the outermost first."""
        env = PurePosixPath(self.env or self.default_run_env)
        return [str(parent) for parent in reversed(env.parents) if parent.name]

    @property
    def layers(self) -> list[str]:
        """Names of all folders that are read; the later ones win."""
        chosen = self.env or self.default_run_env
        return list(dict.fromkeys((self.base_env, *self.parents, chosen, LOCAL)))

    def _read_raw_config(self, key: str) -> Any:
        base, chosen, base_path, env_path, files = super()._read_raw_config(key)
        for folder in self.parents:
            base |= self._read_folder(folder, key, files)
        if LOCAL in self.layers[2:]:
            chosen |= self._read_folder(LOCAL, key, files)
        return base, chosen, base_path, env_path, files

    def _read_folder(self, folder: str, key: str, files: set[Path]) -> Any:
        place, patterns = self._get_conf_env_path(folder), [*self.config_patterns[key]]
        try:
            return self._read_dir_configs(place, patterns, key, files, key == "credentials")
        except MissingConfigException:  # there is no such folder
            return {}


def environments(source: Path) -> list[str]:
    """Names that ``--env`` takes: folders of `source`, and those with parameters below them."""
    folders = {path for path in source.iterdir() if path.is_dir()}
    folders |= {path.parent for path in source.glob("*/**/parameters*.yml")}
    names = {path.relative_to(source).as_posix() for path in folders}
    return sorted(name for name in names if name != "base" and not name.startswith((".", "_")))


def check_environment(context: KedroContext) -> None:
    """Refuse a configuration environment that does not exist, and list those that do.

    Raises:
        UserError: There is no such folder.
    """
    loader: Any = context.config_loader
    source = Path(str(loader.conf_source))
    if not context.env or not source.is_dir() or (source / context.env).is_dir():
        return
    if context.env == getattr(loader, "default_run_env", None):
        return
    found = environments(source)
    # What was `quick` or `camvid_small` is a variant now.
    meant = [n for n in found if context.env in (n.rpartition("/")[2], n.replace("/", "_"))]
    raise UserError(
        f"There is no environment {context.env!r} (of --env or KEDRO_ENV)"
        + (f"; did you mean {' or '.join(meant)}? " if meant else ". ")
        + f"The environments in {source.name}/ are: {', '.join(found) or '(none)'}."
    )
