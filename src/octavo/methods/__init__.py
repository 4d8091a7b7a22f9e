"""Algorithms that find forms for sites: one file a method, registered by decorator."""

from octavo.methods.base import Method, Setting, get_method, method, methods, select_methods

__all__ = ["Method", "Setting", "get_method", "method", "methods", "select_methods"]
