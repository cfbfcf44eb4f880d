"""mmengine's CheckpointHook, which never destroys a checkpoint before its successor is complete."""

from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import register_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.hooks import CheckpointHook as Original
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from qsd.files import replace_content
from qsd.mm.hooks.resuming import send_gradients
from qsd.mm.resuming import POINTER


class WholeFileBackend(LocalBackend):
    """Mmengine's way to local files, which appear under their name only when they are complete."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file in one step.

        Args:
            obj: Its content.
            filepath: Target; its folder is made if it does not exist.
        """
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        replace_content(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write a text in one step.

        Args:
            obj: Its content.
            filepath: Target; its folder is made if it does not exist.
            encoding: Encoding of the text.
        """
        self.put(obj.encode(encoding), filepath)


def install() -> None:
    """Let mmengine write its checkpoints by `WholeFileBackend`."""
    register_backend("local", WholeFileBackend, force=True, prefixes="")


@HOOKS.register_module(name="CheckpointHook", force=True)
class CheckpointHook(Original):
    """Save checkpoints as mmengine does, but remove older ones and note the newest one only after it is complete.

    A best checkpoint in another run's folder, from which the training goes on, stays there.
    """

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        outdated: list[str] = []
        if self.max_keep_ckpts > 0 and not (self.keep_ckpt_ids and self.keep_ckpt_ids[-1] == step):
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated.append(self._path(self.filename_tmpl.format(self.keep_ckpt_ids.popleft())))
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self._path(name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        send_gradients(runner)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            replace_content(Path(runner.work_dir, POINTER), self.last_ckpt.encode())
            self._remove(outdated)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        before = self._best()
        for key in before:  # mmengine would remove these before it writes their successors.
            self._set_best(key, None)
        super()._save_best_checkpoint(runner, metrics)
        after = self._best()
        if is_main_process():
            self._remove([old for key, old in before.items() if old and after.get(key) not in (None, old)])
        for key, old in before.items():
            if old and after.get(key) is None:
                self._set_best(key, old)

    def _best(self) -> dict[str, str | None]:
        """Paths of the best checkpoints by quantity."""
        if hasattr(self, "best_ckpt_path_dict"):
            return dict(self.best_ckpt_path_dict)
        return {"": self.best_ckpt_path} if hasattr(self, "best_ckpt_path") else {}

    def _set_best(self, key: str, path: str | None) -> None:
        if hasattr(self, "best_ckpt_path_dict"):
            self.best_ckpt_path_dict[key] = path
        else:
            self.best_ckpt_path = path

    def _path(self, name: str) -> str:
        return str(self.file_backend.join_path(self.out_dir, name))

    def _remove(self, paths: list[str]) -> None:
        for path in paths:
            if Path(path).parent.absolute() == Path(self.out_dir).absolute() and self.file_backend.isfile(path):
                self.file_backend.remove(path)
