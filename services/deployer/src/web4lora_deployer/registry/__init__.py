"""A client of OCI registries, as far as pushing a model needs one, after the distribution specification 1.1.

`Reference` names a place in a registry, `Login` answers its challenges, `Registry` speaks to it.
"""

from web4lora_deployer.registry.client import Registry
from web4lora_deployer.registry.login import Credentials, read_credentials
from web4lora_deployer.registry.reference import Reference, parse_reference

__all__ = ["Credentials", "Reference", "Registry", "parse_reference", "read_credentials"]
