"""`ModelSummary` and `RichModelSummary`: the table of layers printed when fit starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fulmen.callbacks.callback import Callback
from fulmen.utilities import model_summary as summaries
from fulmen.utilities.console import get_rich_console
from fulmen.utilities.optional import import_optional
from fulmen.utilities.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from fulmen.module import LightningModule
    from fulmen.trainer import Trainer


class ModelSummary(Callback):
    """Prints a table of the model's layers when fit starts.

    Args:
        max_depth: how deep the table goes: 1 shows the direct children, -1 everything, 0 switches the table off.
        **summarize_kwargs: handed on to `summarize`.

    Examples:
        >>> summary = ModelSummary(max_depth=2)
    """

    only_shows = True

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        self._max_depth = max_depth
        self._summarize_kwargs = summarize_kwargs

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._max_depth:
            return
        # On every process: the forward pass of an example may need all of them.
        summary = summaries.ModelSummary(pl_module, self._max_depth)
        if trainer.is_global_zero:
            # Spelled out, so that a command line sees which keywords are left for the constructor.
            self.summarize(
                summary_data=summary.columns(), total_parameters=summary.total_parameters,
                trainable_parameters=summary.trainable_parameters, model_size=summary.model_size,
                total_training_modes=summary.total_training_modes, total_flops=summary.total_flops,
                **self._summarize_kwargs,
            )  # fmt: skip

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]], total_parameters: int, trainable_parameters: int, model_size: float,
        total_training_modes: dict[str, int], total_flops: int, **summarize_kwargs: Any,
    ) -> None:  # fmt: skip
        """Shows the table; override it to show it differently.

        Args:
            summary_data: the columns: a header and the cells below it.
            total_parameters: number of parameters of the model.
            trainable_parameters: number of those that require gradients.
            model_size: size of all parameters, in MB.
            total_training_modes: number of modules in ``"train"`` and in ``"eval"`` mode.
            total_flops: FLOPs of a forward pass of ``example_input_array``; 0 without one.
            **summarize_kwargs: those of the constructor.
        """
        numbers = total_parameters, trainable_parameters, model_size, total_training_modes, total_flops
        rank_zero_info("\n" + summaries.format_summary(summary_data, *numbers))


class RichModelSummary(ModelSummary):
    """Prints the table of layers with Rich.

    Args:
        max_depth: how deep the table goes: 1 shows the direct children, -1 everything, 0 switches the table off.
        **summarize_kwargs: ``header_style``, the Rich style of the header row.

    Raises:
        ModuleNotFoundError: Rich is not installed.

    Examples:
        >>> summary = RichModelSummary(max_depth=-1)
    """

    def __init__(self, max_depth: int = 1, **summarize_kwargs: Any) -> None:
        import_optional("rich", "for `RichModelSummary`", minimum=">=10.2.2")
        super().__init__(max_depth, **summarize_kwargs)

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]], total_parameters: int, trainable_parameters: int, model_size: float,
        total_training_modes: dict[str, int], total_flops: int, **summarize_kwargs: Any,
    ) -> None:  # fmt: skip
        from rich.table import Table

        table = Table(header_style=summarize_kwargs.get("header_style", "bold magenta"))
        for header, _ in summary_data:
            is_number = header in ("Params", "FLOPs")
            table.add_column(header.strip(), justify="right" if is_number else "left", no_wrap=header == "Name")
        for row in zip(*(cells for _, cells in summary_data)):
            table.add_row(*row)
        console = get_rich_console()
        console.print(table)
        numbers = total_parameters, trainable_parameters, model_size, total_training_modes, total_flops
        for label, number in summaries.label_totals(*numbers):
            console.print(f"[bold]{label}[/]: {number}", highlight=False)
