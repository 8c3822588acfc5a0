"""The descriptor pool that the generated modules register in.

It is our own and not protobuf's default one, because other packages (tritonclient, for example) register the same
package `inference` in the default pool, and protobuf refuses the second registration of a name.
"""

from typing import Final

from google.protobuf.descriptor_pool import DescriptorPool

POOL: Final = DescriptorPool()
