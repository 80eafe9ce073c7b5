"""Checkpoints over the network: the Hub's own client, and one sentence for whatever goes wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from sb3_mbdpo.checkpoint_config import (
    CARD,
    CONFIG,
    FILES,
    NORMALIZATION,
    OPTIMIZER,
    OPTIONAL,
    WEIGHTS,
    CheckpointConfig,
    no_config,
    read_config,
)
from sb3_mbdpo.model_card import is_hand_written

# What loading needs; cards and videos stay where they are
LOADED = (CONFIG, WEIGHTS, OPTIMIZER, NORMALIZATION)
# What the HTTP library of this version of huggingface_hub raises
HTTP_ERROR: type[Exception] = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)


def refuse_missing_folder(name: str | Path) -> None:
    """
    :param name: What is no folder
    :raises ValueError: if it is meant to be one, and not the name of a repository
    """
    text = str(name)
    if isinstance(name, Path) or text.startswith((".", "~", "/")) or text.count("/") > 1 or Path(text).exists():
        hint = " (it is a file; a zip of save() is loaded with MBDPO.load)" if Path(text).is_file() else ""
        raise ValueError(
            f"There is no folder {text}{hint}: pass a folder of save_pretrained() or a repository 'user/name'."
        )


def download_checkpoint(
    repo_id: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    files: Sequence[str] = LOADED,
    local_dir: str | Path | None = None,
) -> Path:
    """
    Download the files of a checkpoint; whatever else the repository holds is left there.

    :param repo_id: Repository "user/name"
    :param revision: Branch, tag or commit
    :param token: Token of the Hub
    :param cache_dir: Where downloads are kept
    :param local_files_only: Use what was downloaded before
    :param force_download: Download again
    :param files: Names of the files
    :param local_dir: Put the files here instead of into the cache
    :return: Folder with the files
    :raises ValueError: if there is no checkpoint
    :raises OSError: if it cannot be reached, or the download was cut short
    """

    def fetch(names: Sequence[str]) -> Path:
        path = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            allow_patterns=list(names),
            local_dir=local_dir,
        )
        return Path(path)

    try:
        folder = fetch([CONFIG])
        if not (folder / CONFIG).is_file():
            raise ValueError(no_config(f"The repository {repo_id}", _repo_files(repo_id, revision, token)))
        # Before what may be gigabytes
        read_config(folder)
        return fetch(files)
    except (HTTP_ERROR, OSError, EntryNotFoundError) as error:
        raise _explained(error, repo_id, revision, local_files_only) from error


def _repo_files(repo_id: str, revision: str | None, token: str | bool | None) -> list[str]:
    try:
        return list(HfApi(token=token).list_repo_files(repo_id, revision=revision))
    except (HTTP_ERROR, OSError):
        return []


def upload_checkpoint(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Upload a model of sb3-mbdpo",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool | None = None,
    keep_card: bool = True,
) -> str:
    """
    Upload a folder that :meth:`HubAlgorithm.save_pretrained` wrote, in one commit.

    Files of an earlier checkpoint that the new one does not have are removed; others are left alone.

    :param folder: The folder
    :param repo_id: Repository, made if it does not exist
    :param commit_message: Message of the commit
    :param commit_description: Its longer description
    :param private: Whether a new repository is private
    :param token: Token of the Hub
    :param revision: Branch
    :param create_pr: Open a pull request
    :param keep_card: Leave the repository's card alone where it was edited by hand
    :return: Address of the commit
    :raises ValueError: if the folder holds no checkpoint
    :raises OSError: if the Hub cannot be reached or refuses
    """
    path = Path(folder)
    read_config(path)
    require_token(token)
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        keep_card = keep_card and _has_hand_written_card(api, repo_id, revision)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=path,
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            allow_patterns=[name for name in FILES if name != CARD or not keep_card],
            delete_patterns=[name for name in OPTIONAL if not (path / name).is_file()],
        )
    except (HTTP_ERROR, OSError) as error:
        raise _explained(error, repo_id, revision, False) from error
    if keep_card:
        print(f"The card of {repo_id} was edited by hand and stays; `mbdpo push --as-is` uploads that of a folder.")
    return str(commit.pr_url if create_pr and commit.pr_url else commit.commit_url)


def _has_hand_written_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    try:
        path = api.hf_hub_download(repo_id, CARD, revision=revision)
    except LocalEntryNotFoundError:
        # Not an answer: the Hub was not reached
        raise
    except EntryNotFoundError:
        return False
    return is_hand_written(Path(path).read_text(encoding="utf-8", errors="replace"))


def require_token(token: str | bool | None) -> None:
    """
    :param token: What the user gave
    :raises OSError: if there is no token
    """
    if token is False or (not isinstance(token, str) and get_token() is None):
        raise OSError(
            "There is no token of the Hugging Face Hub: run `hf auth login`, set HF_TOKEN, or pass token=... (one that "
            "may write, from https://huggingface.co/settings/tokens)."
        )


def check_name(repo_id: str) -> None:
    """
    :param repo_id: Name of a repository, to be uploaded to
    :raises ValueError: if the Hub takes none like it
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository, pass 'user/name': {error}") from error


def check_account(token: str | bool | None) -> None:
    """See that the Hub knows the token, before anything that takes long."""
    require_token(token)
    try:
        HfApi(token=token).whoami()
    except (HTTP_ERROR, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise OSError("The Hub does not know this token: run `hf auth login` again, or pass another.") from error
        raise _explained(error, None, None, False) from error


def _explained(error: Exception, repo_id: str | None, revision: str | None, local_files_only: bool) -> OSError:
    """One sentence that says what to do, for what the Hub's client raises."""
    if isinstance(error, GatedRepoError):
        text = f"The repository {repo_id} is gated: ask for access on its page, and pass a token."
    elif isinstance(error, RevisionNotFoundError):
        text = f"The repository {repo_id} has no revision {revision!r}: pass a branch, a tag or a commit of it."
    elif isinstance(error, RepositoryNotFoundError):
        text = (
            f"There is no repository {repo_id} on the Hub, or it is private: check the name; for a private one run "
            "`hf auth login` or pass token=...."
        )
    elif isinstance(error, LocalEntryNotFoundError) and local_files_only:
        text = f"{repo_id} was not downloaded before: load it once without local_files_only."
    elif isinstance(error, LocalEntryNotFoundError):
        text = (
            f"The Hub cannot be reached and {repo_id} was not downloaded before: check the network, or pass a folder."
        )
    elif isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        wanted = " with a token that may write" if status in (401, 403) else ""
        text = f"The Hub refused ({status}) for {repo_id}: try again{wanted}. It says: {str(error).splitlines()[0]}"
    elif isinstance(error, OSError) and error.errno is not None:
        return error
    else:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = repo_id or "the account"
        text = f"The transfer of {what} was cut short or the Hub cannot be reached: try again. ({reason})"
    return OSError(text)


def pull_checkpoint(
    repo_id: str,
    folder: str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Path, CheckpointConfig]:
    """
    Download a whole checkpoint, card, results and video included, and see that it loads.

    What an older checkpoint in the folder has and the new one has not is removed; other files are left alone.

    :param repo_id: Repository
    :param folder: Where it goes; None: the Hub's cache
    :param revision: Branch, tag or commit
    :param token: Token of the Hub
    :param cache_dir: Where downloads are kept
    :return: folder, configuration
    :raises ValueError: if it is no checkpoint or does not load
    :raises OSError: if it cannot be reached
    """
    left: set[str] = set()
    if folder is not None and (Path(folder) / CONFIG).is_file():
        try:
            left = set(OPTIONAL) - set(HfApi(token=token).list_repo_files(repo_id, revision=revision))
        except (HTTP_ERROR, OSError) as error:
            raise _explained(error, repo_id, revision, False) from error
    path = download_checkpoint(repo_id, revision, token, cache_dir, files=FILES, local_dir=folder)
    for name in left:
        (path / name).unlink(missing_ok=True)
    return path, read_config(path)
