"""Flows: what moves around a model, carried in payloads of a stated number of bytes."""

from octavo.flows import updates
from octavo.flows.base import FLOWS, Flow, flow, flow_of
from octavo.flows.flow_plan import FlowPlan
from octavo.flows.schema import Schema

__all__ = ["FLOWS", "Flow", "FlowPlan", "Schema", "flow", "flow_of", "updates"]
