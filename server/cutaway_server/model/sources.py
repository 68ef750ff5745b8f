"""Where a model's files are: `--model` takes a path, a built-in name, or a hub id, and this finds or fetches them."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path

from cutaway_server.cache_directory import cache_directory
from cutaway_server.errors import ModelError
from cutaway_server.model.builtin import BUILTIN, Progress, fetch
from cutaway_server.progress import bar

HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<file>[\w./ +-]+\.gguf))?")
HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")  # never pickles, never code
HUB_IGNORED = ("*/*", "consolidated*")  # other formats' folders; a second copy in Mistral's repositories


def say(message: str) -> None:
    """Tell the operator, on standard error: standard output is for what programs read."""
    print(message, file=sys.stderr, flush=True)


def resolve(model: str, *, cache: Path | None = None, progress: Progress = say) -> Path:
    """The directory or GGUF file that `model` names: a built-in name first, then a path, then "org/name[:file.gguf]".

    Raises ModelError if there is no such thing or it cannot be had.
    """
    if model in BUILTIN:
        with bar(f"fetching {model}") as advance:
            return fetch(BUILTIN[model], cache or cache_directory(), progress, advance=advance)
    path = Path(model).expanduser()
    if model and path.exists():
        return _checked(path)
    hub = HUB_ID.fullmatch(model)
    if hub is None or (hub["file"] is None and model.endswith(".gguf")):
        raise ModelError(_unknown(model))
    return _from_hub(hub["repo"], hub["file"], progress)


def _checked(path: Path) -> Path:
    if path.is_dir() or path.suffix == ".gguf" or _magic(path) == b"GGUF":
        return path
    hint = f"; give its directory, {path.parent}" if path.suffix in (".safetensors", ".json") else ""
    raise ModelError(f"{path} is neither a directory nor a GGUF file{hint}")


def _magic(path: Path) -> bytes:
    if not path.is_file():  # a pipe would block
        return b""
    with path.open("rb") as file:
        return file.read(4)


def _unknown(model: str) -> str:
    near = difflib.get_close_matches(model, BUILTIN, n=3, cutoff=0.5)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return f"there is no model {model!r}{hint}: no such path, and no hub id (org/name[:file.gguf]). {_built_in()}"


def _built_in() -> str:
    return f"Built-in names: {', '.join(BUILTIN)}"


def _from_hub(repo: str, file: str | None, progress: Progress) -> Path:
    # Imported here: a model on disk needs neither the half second nor the package.
    from huggingface_hub import snapshot_download

    progress(f"looking for {repo} on the Hugging Face hub")
    wanted = [*HUB_FILES] if file is None else [file]
    ignored = [*HUB_IGNORED] if file is None else None
    try:
        found = Path(snapshot_download(repo, allow_patterns=wanted, ignore_patterns=ignored))
    except Exception as error:  # the hub's own errors, and those of the HTTP library its version uses
        raise ModelError(f"{repo} cannot be had from the hub: {_reason(error)}. {_built_in()}") from error
    if file is not None and not (found / file).exists():
        raise ModelError(f"{repo} on the hub has no file {file}")
    if file is None and not (found / "config.json").exists():
        raise ModelError(f"{repo} on the hub has no config.json; if it holds GGUF files name one: {repo}:file.gguf")
    return found / file if file else found


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return "it is gated: accept its terms on its page, then run `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and HF_TOKEN does not open it"
    if isinstance(error, LocalEntryNotFoundError):
        return f"the hub cannot be reached and this machine's hub cache has no copy ({error.__cause__ or error})"
    return f"{type(error).__name__}: {error}"
