"""Actor classes with which NDIF 0.1.2 serves nnsight 0.8.1 on a machine without a GPU.

Imported by the server's own processes, never by steerlens: Ray finds it on their PYTHONPATH by the dotted names that
`server.py` sets. Importing it is also what puts the two repairs below in place, so every actor class has a base in this
module: Ray pickles the decorated class by value, and only the import of the base runs this file in the worker.
"""

from __future__ import annotations

from typing import Any

import ray
import torch
from ndif.services.ray.deployments.controller.controller import _ControllerActor
from ndif.services.ray.sandbox.model import SandboxModelDeployment
from nnsight.modeling.huggingface import HuggingFaceModel
from nnsight.modeling.mixins.remotable import Remotable


def _accept_trust_remote_code(name: str) -> None:
    """NDIF passes a keyword that nnsight dropped with 0.8.1; without this every deployment ends in TypeError."""
    described = getattr(Remotable, name).__func__

    def tolerant(cls: type, *args: Any, trust_remote_code: bool = False, **options: Any) -> Any:
        return described(cls, *args, **options)

    setattr(Remotable, name, classmethod(tolerant))


for _name in ("describe_checkpoint", "max_tp_size"):
    _accept_trust_remote_code(_name)

if not torch.cuda.is_available():
    # called after every request; a torch without CUDA raises there

    def _nothing(*args: Any, **options: Any) -> None: ...

    torch.cuda.synchronize = torch.cuda.empty_cache = _nothing


class CPUModelDeployment(SandboxModelDeployment):
    """Holds the model on the CPU; a trusted request runs in this process, any other in a sandbox process."""

    # parking means moving the weights off a GPU
    CACHEABLE = False

    def __init__(self, *args: Any, gpu_mem_bytes_by_id: Any = None, **options: Any):
        # the node's one GPU is a label (`ray start --num-gpus=1`): without it the controller would not count the node
        super().__init__(*args, gpu_mem_bytes_by_id={}, **options)

    def load_from_disk(self) -> Any:
        model = HuggingFaceModel.from_model_key(
            self.model_key, dispatch=True, dtype=self.dtype_name, device="cpu", **self.kwargs
        )
        model._module.requires_grad_(False)
        return model


class CPUController(_ControllerActor):
    """The controller as it is, from a module that carries the repairs."""


@ray.remote(num_cpus=1, max_restarts=-1)
class CPUModelActor(CPUModelDeployment):
    """What the controller deploys: `NDIF_DEFAULT_MODEL_ACTOR_CLASS`."""


@ray.remote(num_cpus=1, num_gpus=0, max_restarts=-1, resources={"head": 1})
class CPUControllerActor(CPUController):
    """What the launcher starts: `NDIF_CONTROLLER_IMPORT_PATH`."""
