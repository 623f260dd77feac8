"""The folder of a run, which it shares with no other that is under way."""

from contextlib import ExitStack
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from diopt_lightning.data.files import remote
from diopt_lightning.errors import ConfigurationError

PATIENCE = 10.0  # seconds, in which the workers of a run that was killed have noticed its end


def take_a_folder(trainer: Trainer) -> ExitStack:
    """Make the folder ``version_N`` of a run whose loggers number it, and let no other run write there meanwhile.

    Lightning looks for a free number and makes the folder much later: runs that begin at the same moment find the same
    one, and their configurations, losses and checkpoints are mixed. Only one of them can make it. A folder that is
    given, by a logger's ``version`` or, without a logger, by ``default_root_dir``, may be that of a run that is over.

    Returns:
        What is to be closed when the run is over; the end of the process does so too, however it comes.

    Raises:
        ConfigurationError: If there can be no such folder, or another run is writing to it.
    """
    taken: dict[str, int | str] = {}  # several loggers of a run write to the same folder
    folders = [] if trainer.loggers or remote(trainer.default_root_dir) else [Path(trainer.default_root_dir)]
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if not isinstance(logger, TensorBoardLogger | CSVLogger) or remote(logger.save_dir):
            continue
        if logger._version is None:
            logger._version = taken.get(logger.root_dir)
        while logger._version is None:
            folder = Path(logger.log_dir)  # this takes the next number
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                if not (isinstance(error, FileExistsError) and folder.is_dir()):
                    raise cannot_be_made(folder, error) from error
                logger._version = None
        taken[logger.root_dir] = logger.version
        folders.append(Path(logger.log_dir))
    with ExitStack() as held:
        for folder in dict.fromkeys(folders) if trainer.is_global_zero else ():
            held.callback(hold(folder).release)
        return held.pop_all()


def hold(folder: Path) -> FileLock:
    """Lock a folder, which the system unlocks when the process has ended."""
    lock = FileLock(folder / ".lock", timeout=PATIENCE, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ConfigurationError(
            f"Another run is writing to the folder {folder}: wait for its end, or give this one a folder of its own, "
            "by the `version` of its logger or by `trainer.default_root_dir`."
        ) from error
    except OSError as error:
        raise cannot_be_made(folder, error) from error
    return lock


def cannot_be_made(folder: Path, error: OSError) -> ConfigurationError:
    """What is wrong with a folder."""
    return ConfigurationError(
        f"Cannot make the folder {folder} of the run ({error.strerror}): set `trainer.default_root_dir` to a folder "
        "that can be written to."
    )
