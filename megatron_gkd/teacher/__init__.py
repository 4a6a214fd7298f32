"""Teachers: what scores the tokens of a batch, and hands a signal to the loss."""

from megatron_gkd.config.teacher import MegatronTeacherConfig, NoTeacherConfig, ServerTeacherConfig
from megatron_gkd.teacher.base import NoTeacher, TeacherEngine
from megatron_gkd.teacher.megatron import MegatronTeacher
from megatron_gkd.teacher.server import ServerTeacher

TEACHERS: dict[type, type[TeacherEngine]] = {
    MegatronTeacherConfig: MegatronTeacher,
    ServerTeacherConfig: ServerTeacher,
    NoTeacherConfig: NoTeacher,
}
"""The teacher of each section. A new kind is a section, a file with its teacher, and a line here."""
