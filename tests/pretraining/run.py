"""One tiny pre-training run as a program: what the tests start, signal, kill and start again.

    python run.py BASE ENCODED CHECKPOINTS RESULT [NAME=NUMBER …]
    python run.py e4t HOME WORD …
    python run.py serve

The second is the command line itself, with a home of its own and templates that the tiny base can
read. The third imports what is slow to import once; then each line on its stdin, a JSON list of a
log file and the arguments above, becomes a process of its own, whose exit code ends up beside its
log.

`batch`, `steps`, `every` and `micro` are of the run; `slow` is seconds slept after each step, and
`dies=K` ends the last process of several after step K as an out-of-memory killer would.
"""

import json
import os
import select
import signal
import sys
import time
from pathlib import Path

import diffusers
import open_clip
import torch
import transformers

from e4t_cli.api import pretraining as pretraining_run
from e4t_cli.cli import app, console
from e4t_cli.models.text_to_image import TextToImageModel
from e4t_cli.pretraining.batches import init_distributed
from e4t_cli.pretraining.checkpoints import CheckpointOptions
from e4t_cli.pretraining.encoded_images import EncodedImages
from e4t_cli.pretraining.loop import (
    DomainInfo,
    TrainingCallbacks,
    TrainingOptions,
    pretrain_domain,
)
from e4t_cli.progress import StopRequest
from e4t_cli.registry.config import PretrainingConfig, TuningConfig


class Slow:
    """Data that takes its time, so that a step can be interrupted in its middle."""

    def __init__(self, data, seconds, dies, processes):
        self.data, self.seconds, self.dies, self.processes = data, seconds, dies, processes
        self.fingerprint = data.fingerprint

    def __len__(self):
        return len(self.data)

    def rows(self, *, step, **place):
        if step == self.dies and self.processes.rank == self.processes.count - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return self.data.rows(step=step, **place)


def work(base, encoded, checkpoints, result, options):
    torch.set_num_threads(1)
    numbers = {name: float(value) for name, value in (one.split("=") for one in options)}
    data = EncodedImages.load(encoded)
    with init_distributed("cpu") as processes:
        model = TextToImageModel.load(base)
        stop = console.current().stop = StopRequest()

        def show(event):
            if event.remark:
                print(event.remark)
            if event.values and "quiet" not in numbers:
                print(f"step {event.done} loss {event.values['loss']:.6f}")

        domain = pretrain_domain(
            model,
            Slow(data, numbers.get("slow", 0.0), int(numbers.get("dies", -1)), processes),
            domain=DomainInfo(
                name="face",
                descriptor="face",
                templates=("{}", "a photo of {}"),
                tuning=TuningConfig(steps=2, base_learning_rate=1e-5, reg_weight=0.1),
            ),
            config=PretrainingConfig(
                steps=int(numbers.get("steps", 12)),
                batch_size=int(numbers.get("batch", 4)),
                base_learning_rate=1e-4,
            ),
            options=TrainingOptions(
                seed=3,
                autocast=False,
                micro_batch=int(numbers["micro"]) if "micro" in numbers else None,
            ),
            checkpoints=CheckpointOptions(folder=Path(checkpoints), every=int(numbers.get("every", 3))),
            callbacks=TrainingCallbacks(
                stop=stop,
                on_progress=show,
                on_step=lambda step: print(f"done {step.step}", flush=True),
            ),
            processes=processes,
        )
        if processes.first:
            domain.save(Path(result))


def run(arguments):
    """Return the exit code that the command line would give this run."""
    if arguments[0] == "e4t":
        for name in ("HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
            os.environ[name] = arguments[1]
        pretraining_run.training_templates = lambda domain: ("{}", "a photo of {}")
        torch.set_num_threads(1)
        return app.run(arguments[2:])
    # Its own way of turning signals and errors into exit codes.
    app.app = lambda **_: work(*arguments[:4], arguments[4:])
    return app.run([])


def serve():
    running = {}
    # Loaded here, so that it is not loaded in each of them.
    _ = diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.DDPMScheduler
    _ = transformers.CLIPTextModel, transformers.CLIPTokenizer, open_clip.transformer
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 0.01 if running else None)
        if ready:
            line = sys.stdin.readline()
            if not line:
                return
            log, *arguments = json.loads(line)
            process = os.fork()
            if not process:
                os.setpgid(0, 0)
                file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                os.dup2(file, 1)
                os.dup2(file, 2)
                code = run(arguments)
                sys.stdout.flush()
                os._exit(code)
            running[process] = log
            print(process, flush=True)
        while running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                break
            code = os.waitstatus_to_exitcode(status)
            result = Path(f"{running.pop(process)}.exit")
            result.with_suffix(".new").write_text(str(code))
            result.with_suffix(".new").rename(result)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        sys.exit(run(sys.argv[1:]))
