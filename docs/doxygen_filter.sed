# SPDX-License-Identifier: Apache-2.0
# Shows Doxygen the comments of our headers as they are written, line by line: `//` above a declaration, behind a member,
# and at the head of the file. Usage: sed -E -f docs/doxygen_filter.sed HEADER
1 s|^// SPDX.*|/// \\file|
s|^( {0,3})//( .*)?$|\1///\2|
# A comment that stands further right goes on with the one behind the member above.
s|^( {4,})// +(.*)$|\1///< \2|
# Behind a member or an enumerator; not behind a brace or a directive.
/^ *[#}]/! s|^( *[^ /].*[^ ])  +// (.*)$|\1  ///< \2|
# The description of an op is that of its struct.
s|^void [a-z0-9_]+\(const ([A-Za-z0-9]+Params)& p\);|/** Takes xgdn::kernel::\1. */ &|
