"""The folder of a run, which it shares with no other."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from diopt_lightning.errors import ConfigurationError


def take_a_folder(trainer: Trainer) -> None:
    """Make the folder ``version_N`` of a run whose loggers number it.

    Lightning looks for a free number and makes the folder much later: runs that begin at the same moment find the same
    one, and their configurations, losses and checkpoints are mixed. Only one of them can make it.

    Raises:
        ConfigurationError: If there can be no such folder.
    """
    taken: dict[str, int | str] = {}  # several loggers of a run write to the same folder
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if not isinstance(logger, TensorBoardLogger | CSVLogger) or "://" in logger.save_dir:
            continue
        if logger._version is None:
            logger._version = taken.get(logger.root_dir)
        while logger._version is None:
            folder = Path(logger.log_dir)  # this takes the next number
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                if not (isinstance(error, FileExistsError) and folder.is_dir()):
                    raise ConfigurationError(
                        f"Cannot make the folder {folder} of the run ({error.strerror}): set "
                        "`trainer.default_root_dir` to a folder that can be written to."
                    ) from error
                logger._version = None
        taken[logger.root_dir] = logger.version
