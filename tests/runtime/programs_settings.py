"""The settings of all our programs. None of them can list these: server and worker are installed apart."""

from ormo_runtime.settings import Settings
from ormo_server.console.settings import ControlSettings, StatusSettings, TopSettings
from ormo_server.export import ExportSettings
from ormo_server.settings import ServerSettings
from ormo_server.sim.plots import PlotSettings
from ormo_server.sim.reproduce.command import ReproduceSettings
from ormo_server.sim.settings import SimSettings
from ormo_worker.integrations.ray.settings import RaySettings, ScaleSettings
from ormo_worker.local.cluster import LocalSettings
from ormo_worker.settings import EvaluateSettings, RunSettings

SERVER = (
    ServerSettings,
    StatusSettings,
    TopSettings,
    ControlSettings,
    ExportSettings,
    SimSettings,
    PlotSettings,
    ReproduceSettings,
)
CLASSES: tuple[type[Settings], ...] = (
    *SERVER,
    RunSettings,
    EvaluateSettings,
    LocalSettings,
    RaySettings,
    ScaleSettings,
)
