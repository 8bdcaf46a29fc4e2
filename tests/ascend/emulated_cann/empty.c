// SPDX-License-Identifier: Apache-2.0
// A library with a name and nothing else.
typedef int nothing;
