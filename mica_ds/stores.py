"""MLflow's tracking URIs: which ones are taken, what they mean on this machine, and secrets in them and elsewhere."""

import base64
import os
import re
from configparser import Error as ConfigError
from configparser import RawConfigParser
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from mica_ds.errors import UserError

SQLITE = "sqlite:///"
# Not MLflow's own files: they would keep a value twice that is sent twice, and MLflow (3.17) refuses them by default.
_SERVERS = ("http", "https", "databricks")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_TELLING = re.compile("pass|token|secret|key|credential", re.IGNORECASE)
_VARIABLES = re.compile("(PASSWORD|PASSWD|TOKEN|SECRET|(^|_)(API)?KEY)$")  # the environment's
_SHORTEST = 4  # characters of a secret: a shorter one would be found in any text


def check_uri(uri: str) -> None:
    """Refuse a URI that MLflow has no store for, or that holds a password. Local.

    Raises: UserError, without the password.
    """
    try:
        parts = urlsplit(uri)
        is_telling = holds_secret(uri)
    except ValueError:
        raise UserError("tracking.uri is no valid address") from None
    scheme = (parts.scheme or uri).partition("+")[0]  # postgresql+psycopg2
    is_server = scheme in _SERVERS
    if is_telling or (is_server and parts.username):
        instead = (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) in the environment"
            if is_server
            else "keep it where the database's client looks for it (PGPASSWORD, ~/.pgpass), or use an `mlflow server`"
        )
        raise UserError(f"tracking.uri holds a secret, which the run folder would keep: take it out, and {instead}")
    if not is_server and (scheme not in _DATABASES or not uri.removeprefix(SQLITE).strip("/")):
        named = "" if "@" in uri else f" {uri}"
        raise UserError(f"tracking.uri:{named} is no store that MLflow knows; use sqlite:///FILE or http://HOST:PORT")
    if scheme == "sqlite" and not uri.startswith(SQLITE):
        raise UserError(f"tracking.uri: {uri} names no file; write {SQLITE}FILE")
    if scheme == "sqlite" and "?" in uri:
        raise UserError(f"tracking.uri: {uri} holds a question mark, where SQLite's file would end for MLflow")


def holds_secret(text: str) -> bool:
    """Whether a text is an address with a password, or with a key or token in its query. Local.

    Raises: ValueError where it is no valid address.
    """
    parts = urlsplit(text)
    return bool(parts.password or any(_TELLING.search(key) for key, _ in parse_qsl(parts.query)))


def sets_secret(text: str) -> bool:
    """Whether a text gives a variable of the environment, by whose name it is a secret, a value. Local."""
    return any(_VARIABLES.search(name) for name in re.findall(r"(\w+)=\S", text))


def without_secrets(text: str) -> str:
    """What another program has said, without the secrets of the environment, MLflow's file, or addresses. Local."""
    secrets = [value for key, value in os.environ.items() if _VARIABLES.search(key)]
    user, password = (_credential(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    if password:  # also as HTTP sends it
        secrets += [password, base64.b64encode(f"{user}:{password}".encode()).decode()]
    secrets = [secret for secret in secrets if len(secret) >= _SHORTEST]
    for secret in sorted([*secrets, *(repr(secret)[1:-1] for secret in secrets)], key=len, reverse=True):
        text = text.replace(secret, "…")
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def _credential(name: str) -> str:
    """A variable of the environment, or what stands for it in the file where MLflow (3.17) looks then."""
    file = RawConfigParser()
    with suppress(ConfigError, OSError, UnicodeDecodeError):
        file.read(os.path.expanduser("~/.mlflow/credentials"))
    return os.environ.get(name) or str(file.get("mlflow", name, fallback=""))


def resolve_uri(uri: str) -> str:
    """The URI with the absolute path of its SQLite file, so that it means the same in any folder. Local."""
    database = database_file(uri)
    return f"{SQLITE}{database}" if database else uri


def database_file(uri: str) -> Path | None:
    """The absolute path of a SQLite store's file; None for other stores. Local."""
    return Path(uri.removeprefix(SQLITE)).absolute() if uri.startswith(SQLITE) else None


def check_folder(uri: str) -> None:
    """Refuse a SQLite store whose folder cannot be there, or not be written. Local. Raises: UserError."""
    database = database_file(uri)
    if database is None:
        return
    existing = next(folder for folder in database.parents if os.path.lexists(folder))
    if database.is_dir() or not existing.is_dir():
        raise UserError(
            f"tracking.uri: {database} cannot be a file: {database if database.is_dir() else existing} is "
            f"{'a' if database.is_dir() else 'no'} folder"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"tracking.uri: the folder {existing} cannot be written; choose another, or a server")
