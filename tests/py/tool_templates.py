# SPDX-License-Identifier: Apache-2.0
"""Chat templates of models that call tools and think, in the two formats of Qwen's models."""

_BEGIN = """
{%- macro turn(role, text) %}<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro %}
{%- if tools %}
{%- set ns = namespace(text="") %}
{%- for tool in tools %}{% set ns.text = ns.text + "\n" + tool|tojson %}{% endfor %}
{{- turn("system", "Call with FORMAT\n<tools>" + ns.text + "\n</tools>") }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}
{{- turn("user", "<tool_response>\n" + message.content + "\n</tool_response>") }}
{%- elif message.role == "assistant" %}
{{- "<|im_start|>assistant\n" }}
{%- if message.reasoning_content %}{{ "<think>\n" + message.reasoning_content + "\n</think>\n\n" }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function %}
"""
_END = """
{%- endfor %}
{{- "<|im_end|>\n" }}
{%- else %}
{{- turn(message.role, message.content) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|im_start|>assistant\n" }}
{%- if enable_thinking is defined %}{{ "<think>\n" if enable_thinking else "<think>\n\n</think>\n\n" }}{% endif %}
{%- endif %}
"""
_HERMES_CALL = """
{{- "\n<tool_call>\n" + {"name": function.name, "arguments": function.arguments}|tojson + "\n</tool_call>" }}
"""
_QWEN_XML_CALL = """
{{- "\n<tool_call>\n<function=" + function.name + ">\n" }}
{%- for name, value in function.arguments|items %}
{{- "<parameter=" + name + ">\n" + (value if value is string else value|tojson) + "\n</parameter>\n" }}
{%- endfor %}
{{- "</function>\n</tool_call>" }}
"""
HERMES = _BEGIN.replace("FORMAT", "<tool_call>JSON</tool_call>") + _HERMES_CALL + _END
QWEN_XML = _BEGIN.replace("FORMAT", "<tool_call><function=NAME></function></tool_call>") + _QWEN_XML_CALL + _END
TEMPLATES = {"hermes": HERMES, "qwen-xml": QWEN_XML}
