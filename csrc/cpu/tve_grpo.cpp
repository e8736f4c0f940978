// Stub.
#include "simd.h"
