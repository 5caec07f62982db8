"""What can go wrong when a policy is loaded, pulled or pushed; each message is one sentence with what to do.

Every class is also the built-in exception a caller would expect, so ``except FileNotFoundError`` works as well as
``except PolicyError``. The exception of the library underneath, if there is one, is the ``__cause__``.

=======================  =====================  =================================================================
class                    also a                 when
=======================  =====================  =================================================================
PolicyNotFoundError      FileNotFoundError      no such folder, repository or revision; a file missing; not cached
UnknownPolicyError       ValueError             a name that is neither bundled, a folder, nor a repository id
InvalidPolicyError       ValueError             an artefact that is damaged, incomplete, foreign or too new
HubPermissionError       PermissionError        gated, not logged in, token refused, no right to write
HubConnectionError       ConnectionError        Hub not reachable, too slow or failing; offline; transfer cut short
=======================  =====================  =================================================================
"""

from __future__ import annotations


class PolicyError(Exception):
    """Base of the exceptions below."""


class PolicyNotFoundError(PolicyError, FileNotFoundError):
    """What was asked for is not there."""


class UnknownPolicyError(PolicyError, ValueError):
    """The name cannot be the name of a policy."""


class InvalidPolicyError(PolicyError, ValueError):
    """The files are there, but are not a policy that this version loads."""


class HubPermissionError(PolicyError, PermissionError):
    """The Hub knows the repository and refuses."""


class HubConnectionError(PolicyError, ConnectionError):
    """The Hub could not be reached, or did not answer properly; trying again may help."""


class CachedPolicyWarning(UserWarning):
    """The Hub could not be asked, so the policy in the cache is used; the message names its commit."""
