// The server's protocol as its reflection tells it: messages and methods without generated code.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"google.golang.org/grpc"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1alpha"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// reflector asks one question after the other on one reflection stream.
type reflector struct {
	stream grpc.BidiStreamingClient[reflectionpb.ServerReflectionRequest, reflectionpb.ServerReflectionResponse]
}

func newReflector(ctx context.Context, conn *grpc.ClientConn) (*reflector, error) {
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	return &reflector{stream}, err
}

func (r *reflector) ask(question *reflectionpb.ServerReflectionRequest) (*reflectionpb.ServerReflectionResponse, error) {
	if err := r.stream.Send(question); err != nil {
		return nil, err
	}
	answer, err := r.stream.Recv()
	if err == nil && answer.GetErrorResponse() != nil {
		err = fmt.Errorf("reflection: %v", answer.GetErrorResponse())
	}
	return answer, err
}

// services gives the full names of the services that the server lists, sorted.
func (r *reflector) services() ([]string, error) {
	answer, err := r.ask(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
	})
	var names []string
	for _, service := range answer.GetListServicesResponse().GetService() {
		names = append(names, service.GetName())
	}
	slices.Sort(names)
	return names, err
}

// service gives the descriptor of a service, built of the file that has it and of all files that this one imports.
func (r *reflector) service(name protoreflect.FullName) (protoreflect.ServiceDescriptor, error) {
	var found descriptorpb.FileDescriptorSet
	known := map[string]bool{}
	collect := func(question *reflectionpb.ServerReflectionRequest) error {
		answer, err := r.ask(question)
		if err != nil {
			return err
		}
		for _, encoded := range answer.GetFileDescriptorResponse().GetFileDescriptorProto() {
			file := new(descriptorpb.FileDescriptorProto)
			if err := proto.Unmarshal(encoded, file); err != nil {
				return err
			}
			if !known[file.GetName()] {
				known[file.GetName()] = true
				found.File = append(found.File, file)
			}
		}
		return nil
	}
	err := collect(&reflectionpb.ServerReflectionRequest{
		MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: string(name)},
	})
	// The list grows while it is walked: what a file imports is asked for when it has not come by itself.
	for i := 0; err == nil && i < len(found.File); i++ {
		for _, imported := range found.File[i].GetDependency() {
			if err == nil && !known[imported] {
				err = collect(&reflectionpb.ServerReflectionRequest{
					MessageRequest: &reflectionpb.ServerReflectionRequest_FileByFilename{FileByFilename: imported},
				})
			}
		}
	}
	if err != nil {
		return nil, err
	}
	files, err := protodesc.NewFiles(&found)
	if err != nil {
		return nil, err
	}
	descriptor, err := files.FindDescriptorByName(name)
	if err != nil {
		return nil, err
	}
	return descriptor.(protoreflect.ServiceDescriptor), nil
}

// method is a method of a service on a connection.
type method struct {
	conn       *grpc.ClientConn
	descriptor protoreflect.MethodDescriptor
}

func (m method) path() string {
	return fmt.Sprintf("/%s/%s", m.descriptor.Parent().FullName(), m.descriptor.Name())
}

// request makes a message of its fields, as protobuf's JSON form has them.
func (m method) request(fields map[string]any) (proto.Message, error) {
	text, err := json.Marshal(fields)
	if err != nil {
		return nil, err
	}
	message := dynamicpb.NewMessage(m.descriptor.Input())
	return message, protojson.Unmarshal(text, message)
}

// call makes a unary call.
func (m method) call(ctx context.Context, fields map[string]any, options ...grpc.CallOption) (protoreflect.Message, error) {
	request, err := m.request(fields)
	if err != nil {
		return nil, err
	}
	answer := dynamicpb.NewMessage(m.descriptor.Output())
	return answer, m.conn.Invoke(ctx, m.path(), request, answer, options...)
}

// stream begins a bidirectional call.
func (m method) stream(ctx context.Context) (grpc.ClientStream, error) {
	return m.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, m.path())
}

// field gives the value of a field by its name, and its default when it is not set.
func field(message protoreflect.Message, name protoreflect.Name) protoreflect.Value {
	return message.Get(message.Descriptor().Fields().ByName(name))
}
