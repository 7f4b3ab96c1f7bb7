"""`ServableModuleValidator`: tries, before training, whether a module can be served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from fulmen.callbacks.callback import Callback
from fulmen.serve.http_server import Response, post_json, serve_module
from fulmen.serve.servable_module import ServableModule
from fulmen.utilities.errors import MisconfigurationException
from fulmen.utilities.modules import capture_buffers, capture_modes
from fulmen.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from fulmen.utilities.seed import isolate_rng

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer


class ServableModuleValidator(Callback):
    """Serves the module over HTTP when training starts, asks it once, and compares the answer.

    The module is a `ServableModule` too. It is asked in eval mode, and training goes on as if it had not been.

    Arguments:
        optimization: None; others are not supported.
        server: accepted for compatibility; the server is Python's own.
        host: the address to listen at.
        port: its port; 0 takes one that is free.
        timeout: how long to wait for the answer, in seconds.
        exit_on_failure: raise if the module cannot be served, instead of a warning.

    Raises:
        NotImplementedError: another `optimization` or `server`.
        TypeError: in a run, if the module is no `ServableModule`.
        MisconfigurationException: in a run, if the module cannot be served.

    Examples:
        >>> validator = ServableModuleValidator(port=0)
        >>> validator.successful is None  # nobody was asked yet
        True
    """

    def __init__(
        self, optimization: Literal["trace", "script", "onnx", "tensorrt"] | None = None,
        server: Literal["fastapi", "ml_server", "torchserve", "sagemaker"] = "fastapi", host: str = "127.0.0.1",
        port: int = 8080, timeout: int = 20, exit_on_failure: bool = True,
    ) -> None:  # fmt: skip
        if optimization is not None:
            raise NotImplementedError(f"`optimization={optimization!r}` is not supported. Leave it out.")
        if server != "fastapi":
            raise NotImplementedError(
                f"`server={server!r}` is not supported, only the default 'fastapi'. Leave it out."
            )
        self.optimization = optimization
        self.server = server
        self.host = host
        self.port = port
        self.timeout = timeout
        self.exit_on_failure = exit_on_failure
        self.resp: Response | None = None

    @property
    def successful(self) -> bool | None:
        """Was the module served? None as long as nobody was asked."""
        return None if self.resp is None else self.resp.ok

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, servable_module: LightningModule) -> None:
        strategy = type(trainer.strategy).__name__
        if strategy.startswith(("FSDP", "DeepSpeed", "ModelParallel")):
            raise MisconfigurationException(f"`{strategy}` splits parameters, and one process cannot serve them alone.")
        if not isinstance(servable_module, ServableModule):
            name = type(servable_module).__name__
            what = (
                f"`ServableModuleValidator` needs a module that is a subclass of `ServableModule`, and `{name}` is not."
            )
            raise TypeError(f"{what} Write `class {name}(LightningModule, ServableModule)`, with its four methods.")
        restore_modes = capture_modes(servable_module)
        restore_buffers = capture_buffers(servable_module)
        servable_module.eval()
        try:
            with isolate_rng():
                problem = self._ask(servable_module)
        finally:
            restore_modes()
            restore_buffers()
        if problem is None:
            rank_zero_info(f"`{type(servable_module).__name__}` can be served.")
        elif self.exit_on_failure:
            raise MisconfigurationException(problem)
        else:
            rank_zero_warn(problem)

    def _ask(self, module: ServableModule) -> str | None:
        """What is wrong with serving the module, if anything is."""
        name = type(module).__name__
        payload = module.configure_payload()
        if "body" not in payload:
            return f"`{name}.configure_payload` must return a dictionary with the key 'body', not {payload!r}."
        with serve_module(module, self.host, self.port) as address:
            try:
                self.resp = post_json(f"{address}/serve", payload, self.timeout)
            except OSError as error:
                return f"`{name}` did not answer within {self.timeout} s: {error}. Raise `timeout` if it needs longer."
        if not self.resp.ok:
            return f"`{name}` cannot be served. Its `serve_step`, or its serialization, raised:\n{self.resp.text}"
        expected = module.configure_response()
        answer = self.resp.json()
        if answer != expected:
            return f"`{name}` was expected to respond with {expected!r}, but it responded with {answer!r}."
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"successful": self.successful, "optimization": self.optimization, "server": self.server}
