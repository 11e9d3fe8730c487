"""``dsakv convert``: a Hugging Face checkpoint as one file a rank, as DeepSeek's own converter would make them."""

from __future__ import annotations

import shlex
import shutil
import time
from pathlib import Path

from dsakv.config import ConvertConfig
from dsakv.console import MB, Console
from dsakv.convert.companions import companion_bytes, copy_companions
from dsakv.convert.journal import JOURNAL, foreign_files, open_journal
from dsakv.convert.plan import PIECE, Plan, make_plan
from dsakv.convert.record import ANOTHER_FOLDER, Order, Record, order_of, read_record, write_record
from dsakv.convert.source import Source, open_source
from dsakv.convert.verify import check_present, verify
from dsakv.convert.write import BATCH, PARTIAL, Writer, sync_folder
from dsakv.errors import DsakvError, InputError
from dsakv.layout import converted_ranks
from dsakv.trace.files import disk_error

_GOES_ON = "the same command goes on where this one stopped"


def convert(
    config: ConvertConfig, console: Console, *, piece_bytes: int = PIECE, batch_bytes: int = BATCH
) -> list[Path]:
    """Convert a checkpoint, or go on with an interrupted conversion, and return the files of the ranks.

    A finished result is left alone; with ``config.verify`` it is compared with the checkpoint. ``piece_bytes`` are
    read, written and checked at once, ``batch_bytes`` written between two notes of what is on the disk.

    Raises:
        InputError: the checkpoint is not whole or does not divide among the ranks; nothing is written then.
        DsakvError: the folder holds something else, the disk is full or fails, or the result is not as it should be.
    """
    directory, folder = _places(config)
    with open_source(directory) as source:
        _check_experts(config, source)
        plan = make_plan(source, config.model_parallel, piece_bytes)
        order = order_of(plan)
        record = read_record(folder)
        if record is None:
            record = _converted(plan, order, folder, config.workers, batch_bytes, console)
        else:
            _check_same(record, order, folder, times=not config.verify)
            check_present(plan, folder, record)
            (folder / JOURNAL).unlink(missing_ok=True)  # killed when all was done
            console.info(f"complete already: {folder} (ranks: {len(plan.files)}, {plan.size / MB:.1f} MB)")
        if config.verify:
            with console.megabytes(plan.size, f"verifying {folder}") as advance:
                verify(plan, folder, record, config.workers, advance)
            console.info(f"verified: every byte in {folder} is that of {directory}")
        else:
            console.info(f"next: {shlex.join(['dsakv', 'generate', '--prompt', 'hello', '--ckpt-path', str(folder)])}")
        return [folder / file.name for file in plan.files]


def _places(config: ConvertConfig) -> tuple[Path, Path]:
    """Where from and where to, which must be apart."""
    if config.hf_ckpt_path is None or config.save_path is None:
        flag = "--hf-ckpt-path" if config.hf_ckpt_path is None else "--save-path"
        raise InputError(f"{flag} is missing", "dsakv convert --hf-ckpt-path CHECKPOINT --save-path NEW_FOLDER")
    directory, folder = Path(config.hf_ckpt_path), Path(config.save_path)
    try:
        here, there = directory.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # links that lead in a circle
        raise InputError(f"{directory} or {folder} leads nowhere: {error}", "mend the links") from error
    if here == there or here in there.parents or there in here.parents:
        raise InputError(
            f"--save-path {folder} and --hf-ckpt-path {directory} lie within each other", "name a folder of its own"
        )
    if converted_ranks(directory) is not None:
        raise InputError(f"{directory} is converted already", "name the Hugging Face folder that it was made from")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--save-path {folder} is no folder", "name a new or empty folder")
    return directory, folder


def _check_experts(config: ConvertConfig, source: Source) -> None:
    there = source.shape.n_routed_experts
    if config.n_experts not in (0, there):
        raise InputError(
            f"--n-experts is {config.n_experts}, {source.directory / 'config.json'} says {there}",
            "leave it out, or name the checkpoint that you mean",
        )


def _check_same(record: Record, order: Order, folder: Path, *, times: bool) -> None:
    """A finished conversion in the folder must be the one that is asked for."""
    if other := record.order.differs(order, times=times):
        raise DsakvError(f"{folder} holds another conversion ({other})", ANOTHER_FOLDER)


def _converted(plan: Plan, order: Order, folder: Path, workers: int, batch_bytes: int, console: Console) -> Record:
    """Write what is missing of the result."""
    begun, start = (folder / JOURNAL).exists(), time.monotonic()
    if not begun and folder.exists() and (foreign := sorted(path.name for path in folder.iterdir())):
        raise foreign_files(folder, foreign)
    _check_space(plan, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open_journal(folder, order) as journal, Writer(plan, folder, journal, workers, batch_bytes) as writer:
            if writer.bytes_inherited:
                with console.megabytes(writer.bytes_inherited, "checking what is there") as advance:
                    lost = writer.check(advance)
                if lost:
                    console.warn(f"{lost / MB:.1f} MB of it are damaged and written again")
            left = writer.bytes_left
            if begun:
                console.info(f"going on: {(plan.size - left) / MB:.1f} of {plan.size / MB:.1f} MB are there")
            with console.megabytes(left, "converting") as advance:
                writer.write(advance)
            plan.source.check_unchanged()
            files = writer.complete()
            copied = copy_companions(plan.source.directory, folder)
            if order_of(plan) != order:
                raise DsakvError(
                    f"{plan.source.directory / 'config.json'} changed meanwhile",
                    "convert again, into another folder, when the checkpoint is whole",
                )
            record = Record(order=order, files=files, copied=copied)
            write_record(folder, record)
            (folder / JOURNAL).unlink(missing_ok=True)
            sync_folder(folder)
    except KeyboardInterrupt:
        console.info(_GOES_ON)
        raise
    except OSError as error:
        raise disk_error(error, folder, f"make room or mend the disk; {_GOES_ON}") from error
    size = sum(file.bytes for file in files) + sum(file.bytes for file in copied)
    seconds = time.monotonic() - start
    number = len(files) + len(copied)
    console.info(f"converted: {number} files, {size / MB:.1f} MB, in {seconds:.1f} s: {folder}")
    return record


def _check_space(plan: Plan, folder: Path) -> None:
    """Say before the work, not after it, that the disk is too small."""
    needed = plan.size + companion_bytes(plan.source.directory)
    for file in plan.files:
        for path in (folder / file.name, folder / f"{file.name}{PARTIAL}"):
            if path.is_file():
                needed -= min(path.stat().st_blocks * 512, file.size)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DsakvError(
            f"the disk is too full: {needed / MB:.0f} MB are needed in {folder}, {free / MB:.0f} MB are free",
            "free some space, or name a folder on another disk with --save-path",
        )
