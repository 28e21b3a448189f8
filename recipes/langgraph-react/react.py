"""A ReAct agent on langgraph: a model that decides, tools, and a checkpoint between any two steps, so that a decision can
be looked at, and changed, before it is carried out."""

import datetime
import os
from typing import Any

import requests
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, convert_to_openai_messages
from langchain_core.output_parsers.openai_tools import parse_tool_call
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition


class ChatCompletions(BaseChatModel):
    """Any server with the chat-completions interface: `OPENAI_BASE_URL`, `OPENAI_API_KEY` and `OPENAI_MODEL`, as they are
    at each call, so that each copy may have its own."""

    timeout_s: float = 120

    @property
    def _llm_type(self) -> str:
        return "chat-completions"

    def bind_tools(self, tools, *, tool_choice=None, **options):
        return self.bind(tools=[convert_to_openai_tool(one) for one in tools], tool_choice=tool_choice, **options)

    def _generate(self, messages, stop=None, run_manager=None, *, tools=(), tool_choice=None, **options: Any):
        asked = {"model": os.environ["OPENAI_MODEL"], "messages": convert_to_openai_messages(messages)}
        if tools:
            asked["tools"] = list(tools)
        if tool_choice:
            asked["tool_choice"] = {"type": "function", "function": {"name": tool_choice}}
        if stop:
            asked["stop"] = stop
        headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}"}
        url = f"{os.environ['OPENAI_BASE_URL']}/chat/completions"
        answer = requests.post(url, json=asked, headers=headers, timeout=self.timeout_s)
        answer.raise_for_status()
        said = answer.json()["choices"][0]["message"]
        calls = [parse_tool_call(call, return_id=True) for call in said.get("tool_calls") or ()]
        message = AIMessage(content=said.get("content") or "", tool_calls=calls)
        return ChatResult(generations=[ChatGeneration(message=message)])


@tool
def factors(number: int) -> str:
    """The prime factors of a number."""
    found, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return " x ".join(map(str, [*found, number] if number > 1 or not found else found))


@tool
def roman(number: int) -> str:
    """A number as the Romans wrote it."""
    letters = [(1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"), (40, "XL")]
    letters += [(10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]
    written = ""
    for value, letter in letters:
        count, number = divmod(number, value)
        written += letter * count
    return written


@tool
def weekday(number: int) -> str:
    """The day of the week that a year began with."""
    return datetime.date(number, 1, 1).strftime("%A")


TOOLS = [factors, roman, weekday]
MODEL = ChatCompletions()


def decide(state, config):
    """The model's turn. The configuration may name the tool that the first decision has to take."""
    wanted = config["configurable"].get("tool") if state["messages"][-1].type == "human" else None
    return {"messages": [MODEL.bind_tools(TOOLS, tool_choice=wanted).invoke(state["messages"])]}


def compiled():
    """The graph: decide, carry out, decide again, until nothing is to be carried out."""
    graph = StateGraph(MessagesState)
    graph.add_node("decide", decide)
    graph.add_node("tools", ToolNode(TOOLS))
    graph.add_edge(START, "decide")
    graph.add_conditional_edges("decide", tools_condition)
    graph.add_edge("tools", "decide")
    return graph.compile(checkpointer=InMemorySaver())


agent = compiled()
# The conversation that `take` goes on with: each question begins one.
_thread = 0


def config(tool=None):
    """What langgraph is told of the conversation, and of the tool that the model has to take."""
    return {"configurable": {"thread_id": str(_thread), "tool": tool}}


def messages():
    """All that was said in the conversation."""
    return agent.get_state(config()).values.get("messages", [])


def ask(question, tool=None):
    """Begins a conversation: has the model decide, or decide for a tool, and stops there. Returns the decision."""
    global _thread
    agent.checkpointer.delete_thread(str(_thread))
    _thread += 1
    agent.invoke({"messages": [HumanMessage(question)]}, config(tool), interrupt_before=["tools"])
    return waiting()


def waiting():
    """The decision that is not carried out yet, a tool and its arguments. None when there is none."""
    calls = getattr(messages()[-1], "tool_calls", None)
    return (calls[0]["name"], calls[0]["args"]) if calls else None


def take(tool=None):
    """Carries the decision out, with another tool than the decided one if need be. Returns the answer."""
    last = messages()[-1]
    if not getattr(last, "tool_calls", None):
        raise ValueError("no decision is waiting: ask something")
    if tool:
        calls = [{**call, "name": tool} for call in last.tool_calls]
        agent.update_state(config(), {"messages": [last.model_copy(update={"tool_calls": calls})]}, "decide")
    return agent.invoke(None, config())["messages"][-1].content
